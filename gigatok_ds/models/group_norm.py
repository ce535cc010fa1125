"""Group norm, alone and with SiLU behind it, of maps (B, C, H, W) in whichever memory layout they lie.

On GPUs torch's own returns the default layout, and every convolution after it would turn maps around: those that lie
channels_last are for `kernels.group_norm_ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.kernels import group_norm_ops as fused
from gigatok_ds.models.layout import layout_of

aten = torch.ops.aten


class GroupNorm(nn.GroupNorm):
    """torch's, with weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        if fused.suits(x):
            return fused.group_norm(x, self.weight, self.bias, self.num_groups, self.eps, silu=False)
        return super().forward(x)


class GroupNormSiLU(nn.GroupNorm):
    """silu(group norm) as one operation that keeps only its input, whose backward pass normalises again.

    Apart, autograd would keep the norm's output as well, a third of what a residual block keeps.
    """

    def forward(self, x: Tensor) -> Tensor:
        if fused.suits(x):
            return fused.group_norm(x, self.weight, self.bias, self.num_groups, self.eps, silu=True)
        return _NormSiLU.apply(x, self.weight, self.bias, self.num_groups, self.eps)


class _NormSiLU(torch.autograd.Function):
    """The norm by torch's kernels: on CPUs, which take both layouts, and on GPUs without Triton."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        y, mean, rstd = _norm(_arithmetic(x, weight, bias), groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(y, inplace=True).to(x.dtype).contiguous(memory_format=layout_of(x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        *inputs, mean, rstd = ctx.saved_tensors
        b, c, h, w = gradient.shape
        layout = layout_of(inputs[0])
        x, weight, bias, gradient = _arithmetic(*inputs, gradient.contiguous(memory_format=layout))
        gradient = aten.silu_backward(gradient, _norm((x, weight, bias), ctx.groups, ctx.eps)[0])
        gradients = aten.native_group_norm_backward(gradient, x, mean, rstd, weight, b, c, h * w, ctx.groups,
                                                    [True, True, True])
        of_x, *others = (own.to(given.dtype) for own, given in zip(gradients, inputs, strict=True))
        return of_x.contiguous(memory_format=layout), *others, None, None


def _arithmetic(x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
    """As torch's kernels should get them: on GPUs in float32 at least, since they keep a mean in its input's type."""
    x = x.contiguous(memory_format=layout_of(x))
    if x.device.type == "cpu":
        return x, *more
    return tuple(tensor.to(torch.promote_types(x.dtype, torch.float32)) for tensor in (x, *more))


def _norm(inputs: tuple[Tensor, ...], groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and 1 / standard deviation (B, groups), of x, weight and bias."""
    x, weight, bias = inputs
    b, c, h, w = x.shape
    return aten.native_group_norm(x, weight, bias, b, c, h * w, groups, eps)
