"""A projection to a vocabulary and its cross-entropy, some rows at a time: the logits are never all held.

Forward and backward each compute the logits of a chunk of rows, use them and forget them. What is kept for the backward
pass is one number per row, the logarithm of the sum of exponentials: one more matrix product is paid for it. The weight
is read once in each direction, so that ZeRO-3 gathers it twice a step, not once per chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**24  # held at once; in float32: 64 MiB

# Combines what the ranks that share a vocabulary found in their parts: of each row, log-sum-exp and the target's logit.
Join = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def head_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, join: Join | None = None) -> Tensor:
    """-log softmax(x weight^T)[target] in nats: float32 (...), for x (..., width) and int64 targets (...).

    The products are of the inputs' type, everything after them is float32. With `join`, weight (V, width) is this
    rank's part of the vocabulary, targets count from its first row, and those outside of [0, V) belong to other ranks.
    """
    losses: Tensor = _HeadCrossEntropy.apply(x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), join)
    return losses.view(targets.shape)


def join_over(group: dist.ProcessGroup) -> Join:
    """Parts of a vocabulary on the ranks of `group`."""
    return partial(_join, group=group)


def _join(totals: Tensor, picked: Tensor, *, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    highest = totals.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    sums = torch.stack([(totals - highest).exp(), picked])
    dist.all_reduce(sums, group=group)
    return highest + sums[0].log(), sums[1]


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, join: Join | None) -> Tensor:
        totals, picked = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
        for rows in _chunks(x, weight):
            totals[rows], picked[rows] = totals_and_picked(x[rows] @ weight.t(), targets[rows])
        if join:
            totals, picked = join(totals, picked)
        ctx.save_for_backward(x, weight, targets, totals)
        return totals - picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, targets, totals = ctx.saved_tensors
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        of_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        gradient = gradient.contiguous()
        for rows in _chunks(x, weight):
            of_logits = x[rows] @ weight.t()
            become_gradient_(of_logits, targets[rows], totals[rows], gradient[rows])
            if of_x is not None:
                of_x[rows] = of_logits @ weight
            if of_weight is not None:
                _add_product_(of_weight, of_logits.t(), x[rows])
        return of_x, None if of_weight is None else of_weight.to(weight.dtype), None, None


def _chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    rows = max(CHUNK_LOGITS // len(weight), 1)
    return (slice(start, start + rows) for start in range(0, len(x), rows))


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to `total`, which is float32 for half-precision a and b: rounding each chunk's would add up."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type != "cpu":
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:  # the CPU's products have no other type than their factors
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


# What is done to the logits (R, V) of a chunk, which is most of the memory's traffic: each an operation that reads them
# once.


@torch.library.custom_op("gigatok::totals_and_picked", mutates_args=())
def totals_and_picked(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row its log-sum-exp and the logit of its target, or 0 for one outside of [0, V): float32 (R,)."""
    if logits.is_cuda and (kernels := _kernels()):
        found: tuple[Tensor, Tensor] = kernels.totals_and_picked(logits, targets)
        return found
    wide = logits.float()
    columns, owned = _columns(targets, wide)
    picked = wide.gather(1, columns[:, None])[:, 0].where(owned, 0.0)
    highest = wide.amax(1)
    return (wide - highest[:, None]).exp_().sum(1).log_() + highest, picked


@totals_and_picked.register_fake
def _(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    totals, picked = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    return totals, picked


@torch.library.custom_op("gigatok::become_gradient_", mutates_args={"logits"})
def become_gradient_(logits: Tensor, targets: Tensor, totals: Tensor, gradient: Tensor) -> None:
    """Turn logits into (softmax minus one at the target) x gradient (R,), given the totals of `totals_and_picked`."""
    if logits.is_cuda and (kernels := _kernels()):
        kernels.become_gradient_(logits, targets, totals, gradient)
        return
    wide = logits.float()  # the same memory if they are float32
    columns, owned = _columns(targets, wide)
    wide.sub_(totals[:, None]).exp_()
    wide[torch.arange(len(columns), device=wide.device), columns] -= owned.float()
    wide.mul_(gradient[:, None])
    if wide.dtype != logits.dtype:
        logits.copy_(wide)


@become_gradient_.register_fake
def _(logits: Tensor, targets: Tensor, totals: Tensor, gradient: Tensor) -> None:
    return None


@functools.cache
def _kernels() -> ModuleType | None:
    """Those of GPUs; None where torch came without Triton."""
    try:
        from gigatok_ds.kernels import cross_entropy_triton
    except ModuleNotFoundError:
        return None
    return cross_entropy_triton


def _columns(targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Where in this part of the vocabulary each target is, and whether it is there at all."""
    owned = (targets >= 0) & (targets < logits.shape[1])
    return targets.clamp(0, logits.shape[1] - 1), owned
