"""An addressed dropout as torch.ops.gigatok.addressed_dropout: one operation, forward and again backward, that saves no
mask.

On a GPU it is one kernel (`dropout_triton`); elsewhere, and where a compiler fuses it, it is `dropout_mask.dropped`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from gigatok_ds.kernels.dropout_mask import dropped


@torch.library.custom_op("gigatok::addressed_dropout", mutates_args=())
def addressed_dropout(x: Tensor, samples: Tensor, rule: Tensor, token: int, feature: int, full: bool) -> Tensor:
    """`dropped` as one operation; contiguous. All tensors lie on one device."""
    if x.is_cuda and x.dtype != torch.float64 and (drop := _kernel()):
        return drop(x.contiguous(), samples, rule, token, feature, full)
    return dropped(x, samples, rule, token, feature, full).contiguous()


@addressed_dropout.register_fake
def _(x: Tensor, samples: Tensor, rule: Tensor, token: int, feature: int, full: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    _, samples, rule, *ctx.options = inputs
    ctx.save_for_backward(samples, rule)


def _gradient(ctx, gradient: Tensor):
    return addressed_dropout(gradient, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


addressed_dropout.register_autograd(_gradient, setup_context=_save)


@functools.cache
def _kernel() -> Callable[..., Tensor] | None:
    """The kernel of GPUs; None where torch came without Triton."""
    try:
        from gigatok_ds.kernels.dropout_triton import drop
    except ModuleNotFoundError:
        return None
    return drop
