"""3x3 convolutions, which on CPUs are most of a tokenizer's training."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of a map and its channels; below, torch's usual convolution was as fast or faster (benchmarks/convolution.py).
MIN_POSITIONS, MIN_CHANNELS = 64 * 64, 64


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution (B, C, H, W) to (B, C', H, W) with zero padding.

    Float32 training on a CPU computes large ones by Winograd's transform (Lavin and Gray 2016, F(6x6, 3x3) of NNPACK,
    which comes with torch): a fifth of the multiplications, and results that differ by 5e-6 of their norm. Everything
    else, evaluation included, is torch's usual convolution.
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
    # The plain type: not what is traced, counted or rehearsed without values.
    return (type(x) is Tensor and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
            and min(weight.shape[:2]) >= MIN_CHANNELS and x.shape[2] * x.shape[3] >= MIN_POSITIONS
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling() and available())


@cache
def available() -> bool:
    """Whether this torch has NNPACK and this processor is one of its; readies it."""
    return hasattr(torch, "_nnpack_available") and torch._nnpack_available()


def _images_convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # One image after the other: several at once are slower than torch's usual convolution.
    images = [torch._nnpack_spatial_convolution(image, weight, bias, (1, 1)) for image in x.split(1)]
    return images[0] if len(images) == 1 else torch.cat(images)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _images_convolved(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, *of_parameters = ctx.needs_input_grad
        _, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient, x, weight, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, *of_parameters])
        # The gradient at x is a convolution, too, with the weights turned by 180 degrees.
        turned = weight.transpose(0, 1).flip(2, 3).contiguous()
        return _images_convolved(gradient.contiguous(), turned, None) if of_x else None, of_weight, of_bias
