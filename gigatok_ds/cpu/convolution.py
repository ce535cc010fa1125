"""3x3 convolutions, which are most of a tokenizer's training on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gigatok_ds.cpu import winograd

# Of a map and its channels; below, torch's usual convolution was as fast or faster (benchmarks/convolution.py).
MIN_POSITIONS, MIN_CHANNELS = 32 * 32, 64
MAX_FILTERS = 256  # input times output channels for each position: what is done for each filter gains no time


def use_winograd(*networks: nn.Module) -> None:
    """Let 3x3 convolutions of networks that train in float32 on a CPU go by Winograd's transform where that is faster.

    It takes a quarter of the multiplications, and results differ by 2e-6 of their norm. Everything else, evaluation
    included, stays torch's usual convolution.
    """
    for network in networks:
        for module in network.modules():
            if type(module) is nn.Conv2d and _shape_of(module) == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
                module.__class__ = WinogradConv2d


def _shape_of(layer: nn.Conv2d) -> tuple:
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution (B, C, H, W) to (B, C', H, W) with zero padding."""

    def forward(self, x: Tensor) -> Tensor:
        if (self.training or x.requires_grad) and _suits(x, self.weight):  # frozen networks are never in training
            return _Winograd.apply(x, self.weight, self.bias)
        return super().forward(x)


def _suits(x: Tensor, weight: Tensor) -> bool:
    positions = x.shape[2] * x.shape[3]
    # The plain type: not what is traced, counted or rehearsed without values.
    return (type(x) is Tensor and x.dtype == weight.dtype and min(weight.shape[:2]) >= MIN_CHANNELS
            and weight.shape[0] * weight.shape[1] <= MAX_FILTERS * positions and positions >= MIN_POSITIONS
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling() and winograd.has_winograd(x))


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return winograd.convolution(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (winograd.input_gradient(gradient, weight) if of_x else None,
                winograd.weight_gradient(x, gradient) if of_weight else None,
                gradient.sum((0, 2, 3)) if of_bias else None)
