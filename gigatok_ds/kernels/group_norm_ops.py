"""torch.ops.gigatok.group_norm_*: group norm of channels_last maps, with SiLU behind it or not, for GPUs.

Four operators, each a pass or two over the maps, so that what counts or compiles sees what crosses memory: statistics
reads x, normalized reads x and writes y; backward, sums reads x and the gradient, gradients reads both and writes one.
That is 6 and 10 bytes an element in half precision. Only x, the means and the reciprocal deviations are kept.

The kernels are in Triton (`group_norm_triton`), which is imported when one is first run: fake tensors need none. NVIDIA
apex's kernels for this layout move the same bytes, but add in whatever order atomics come and take the variance as
E[x^2] - E[x]^2, so that runs do not repeat and maps far from zero lose their variance.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# torch brings it along for Linux. A constant, which compilers see through.
HAS_TRITON = importlib.util.find_spec("triton") is not None
_LIBRARY = torch.library.Library("gigatok", "FRAGMENT")


def suits(x: Tensor) -> bool:
    """Whether maps (B, C, H, W) are for these operators: channels_last, of one of DTYPES, on a GPU that has Triton.

    Maps without storage (device meta) stand for those in any layout, which torch's convolutions do not keep up there.
    """
    if x.dtype not in DTYPES or x.numel() == 0:
        return False
    return x.device.type == "meta" or (x.device.type == "cuda" and _layout(x) == torch.channels_last and HAS_TRITON)


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool) -> Tensor:
    """Group norm of channels_last x (B, C, H, W), in its type and layout, then SiLU if asked for; differentiable once.

    weight and bias are (C,), or (B, C) where each sample has its own. Arithmetic is float32 at least.
    """
    return _GroupNorm.apply(x, weight, bias, groups, eps, silu)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        weight, bias = weight.contiguous(), bias.contiguous()
        mean, rstd = torch.ops.gigatok.group_norm_statistics(x, groups, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.silu = silu
        return torch.ops.gigatok.group_norm_normalized(x, mean, rstd, weight, bias, silu)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        saved = ctx.saved_tensors  # once: activation checkpointing hands them out once
        gradient = gradient.contiguous(memory_format=_layout(saved[0]))
        sums = torch.ops.gigatok.group_norm_sums(gradient, *saved, ctx.silu)
        gradients = torch.ops.gigatok.group_norm_gradients(gradient, *saved, *sums, ctx.silu)
        return *gradients, None, None, None


def _operator(schema: str, kernel: str):
    """Define gigatok::`schema`, which runs `kernel` of the Triton module; the decorated function is its fake."""
    def register(fake):
        name = f"gigatok::{schema.partition('(')[0]}"
        _LIBRARY.define(schema)

        def run(*args):
            from gigatok_ds.kernels import group_norm_triton

            return getattr(group_norm_triton, kernel)(*args)

        torch.library.impl(name, "CompositeExplicitAutograd", run, lib=_LIBRARY)
        torch.library.register_fake(name, fake, lib=_LIBRARY)
        return fake

    return register


@_operator("group_norm_statistics(Tensor x, int groups, float eps) -> (Tensor, Tensor)", "statistics")
def _(x, groups, eps):
    shape = (x.shape[0], groups)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


@_operator("group_norm_normalized(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, bool silu) -> Tensor",
           "normalized")
def _(x, mean, rstd, weight, bias, silu):
    return torch.empty_like(x)


@_operator("group_norm_sums(Tensor gradient, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, bool silu)"
           " -> (Tensor, Tensor)", "sums")
def _(gradient, x, mean, rstd, weight, bias, silu):
    sums, means = (2, *x.shape[:2]), (2, *mean.shape)
    return x.new_empty(sums, dtype=torch.float32), x.new_empty(means, dtype=torch.float32)


@_operator("group_norm_gradients(Tensor gradient, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias,"
           " Tensor sums, Tensor means, bool silu) -> (Tensor, Tensor, Tensor)", "gradients")
def _(gradient, x, mean, rstd, weight, bias, sums, means, silu):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
