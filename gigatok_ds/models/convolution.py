"""3x3 convolutions, which on CPUs are most of a tokenizer's training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.kernels import winograd

# Of a map and its channels; below, torch's usual convolution was as fast or faster (benchmarks/convolution.py).
MIN_POSITIONS, MIN_CHANNELS = 32 * 32, 64
MAX_FILTERS = 256  # input times output channels for each position: what is done for each filter gains no time


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution (B, C, H, W) to (B, C', H, W) with zero padding.

    Float32 training on a CPU computes large ones by Winograd's transform (`kernels.winograd`): a quarter of the
    multiplications, and results that differ by 2e-6 of their norm. Everything else, evaluation included, is torch's usual
    convolution.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return convolved(x, self) if self.training else super().forward(x)


def convolved(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """A 3x3 convolution with padding 1 as `Conv3x3` computes it while training."""
    if _suits(x, layer.weight):
        return _Winograd.apply(x, layer.weight, layer.bias)
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


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
