"""Group norm followed by SiLU as one operation that keeps only its input, in whichever memory layout that lies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


class GroupNormSiLU(nn.GroupNorm):
    """silu(group norm of (B, C, H, W)), whose backward pass normalises again.

    Apart, autograd would keep the norm's output as well, a third of what a residual block keeps.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _NormSiLU.apply(x, self.weight, self.bias, self.num_groups, self.eps)


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        ours = _torch_norm if x.device.type == "cpu" else _any_layout_norm
        y, mean, rstd = ours(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(y, inplace=True).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=layout_of(x))
        if x.device.type == "cpu":
            gradients = _torch_backward(gradient, x, weight, bias, ctx.groups, ctx.eps, mean, rstd)
        else:
            gradients = _any_layout_backward(gradient, x, weight, bias, mean, rstd)
        return *gradients, None, None


# On CPUs torch's own kernels take both layouts.


def _torch_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    b, c, h, w = x.shape
    x = x.contiguous(memory_format=layout_of(x))
    return aten.native_group_norm(x, weight, bias, b, c, h * w, groups, eps)


def _torch_backward(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, mean: Tensor,
                    rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, c, h, w = x.shape
    x = x.contiguous(memory_format=layout_of(x))
    y = aten.native_group_norm(x, weight, bias, b, c, h * w, groups, eps)[0]
    gradient = aten.silu_backward(gradient, y)
    return aten.native_group_norm_backward(gradient, x, mean, rstd, weight, b, c, h * w, groups, [True, True, True])


def layout_of(x: Tensor) -> torch.memory_format:
    """Whether a map's channels are its innermost axis."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


# On GPUs torch's group norm would return the default layout, and every convolution after it would turn maps around.


def _any_layout_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and 1 / standard deviation (B, groups), in float32 (or float64) even for lower precision."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = x.mean((2, 3), dtype=wide).unflatten(1, (groups, -1)).mean(2)
    # Around the mean: the difference of large squares would lose the variance of maps far from zero.
    centred = _centred(x, mean)
    squares = torch.linalg.vector_norm(centred, 2, (2, 3)).square() / (x.shape[2] * x.shape[3])
    rstd = (squares.unflatten(1, (groups, -1)).mean(2) + eps).rsqrt()
    return _scaled(centred, weight, bias, rstd), mean, rstd


def _centred(x: Tensor, mean: Tensor) -> Tensor:
    """x minus the mean (B, groups) of its group, in the mean's type."""
    return x - mean.repeat_interleave(x.shape[1] // mean.shape[1], 1)[:, :, None, None]


def _scaled(centred: Tensor, weight: Tensor, bias: Tensor, rstd: Tensor) -> Tensor:
    scale = rstd[:, :, None] * weight.to(rstd.dtype).view(1, rstd.shape[1], -1)
    return torch.addcmul(bias.to(rstd.dtype)[None, :, None, None], centred, _per_channel(scale))


def _any_layout_backward(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor,
                         rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide, count, centred = rstd.dtype, x[0].numel() // rstd.shape[1], _centred(x, mean)
    gradient = aten.silu_backward(gradient.to(wide), _scaled(centred, weight, bias, rstd))
    rstd = rstd[:, :, None]
    gamma = weight.to(wide).view(1, rstd.shape[1], -1)
    # Per sample and channel: sums over positions of the gradient, and of it times the normalised value.
    plain = gradient.sum((2, 3)).view(len(x), *gamma.shape[1:])
    times = (gradient * centred).sum((2, 3)).view_as(plain) * rstd
    # The gradient at x is rstd * (gamma g - mean(gamma g) - normalised x * mean(gamma g * normalised x)).
    of_centred = -rstd.square() * (gamma * times).sum(2, keepdim=True) / count
    constant = -rstd * (gamma * plain).sum(2, keepdim=True) / count
    result = torch.addcmul(_per_channel(constant.expand_as(plain)), gradient, _per_channel(rstd * gamma))
    result = result.addcmul_(centred, _per_channel(of_centred.expand_as(plain)))
    return result.to(x.dtype), times.sum(0).flatten().to(weight.dtype), plain.sum(0).flatten().to(bias.dtype)


def _per_channel(values: Tensor) -> Tensor:
    """(B, groups, C / groups) as (B, C, 1, 1)."""
    return values.flatten(1)[:, :, None, None]
