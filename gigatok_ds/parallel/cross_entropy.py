"""A projection to a vocabulary and its cross-entropy, some rows at a time: the logits are never all held.

Forward and backward each compute the logits of a chunk of rows, use them and forget them. What is kept for the backward
pass is one number per row, the logarithm of the sum of exponentials: one more matrix product is paid for it. The weight
is read once in each direction, so that ZeRO-3 gathers it twice a step, not once per chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**24  # held at once, in float32: 64 MiB

# Combines what the ranks that share a vocabulary found in their parts: of each row, log-sum-exp and the target's logit.
Join = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def head_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, join: Join | None = None) -> Tensor:
    """-log softmax(x weight^T)[target] in nats: float32 (...), for x (..., width) and int64 targets (...).

    The products are of the inputs' type, everything after them is float32. With `join`, weight (V, width) is this
    rank's part of the vocabulary, targets count from its first row, and those outside of [0, V) belong to other ranks.
    """
    losses = _HeadCrossEntropy.apply(x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), join)
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
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, join: Join | None) -> Tensor:
        totals, picked = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
        for rows in _chunks(x, weight):
            logits = _logits(x[rows], weight)
            columns, owned = _columns(targets[rows], weight)
            picked[rows] = logits.gather(1, columns[:, None])[:, 0].where(owned, 0.0)
            highest = logits.amax(1, keepdim=True)
            totals[rows] = logits.sub_(highest).exp_().sum(1).log_() + highest[:, 0]
        if join:
            totals, picked = join(totals, picked)
        ctx.save_for_backward(x, weight, targets, totals)
        return totals - picked

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight, targets, totals = ctx.saved_tensors
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        of_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for rows in _chunks(x, weight):
            columns, owned = _columns(targets[rows], weight)
            of_logits = _logits(x[rows], weight).sub_(totals[rows, None]).exp_()
            of_logits[torch.arange(len(columns), device=x.device), columns] -= owned.float()
            of_logits = of_logits.mul_(gradient[rows, None]).to(x.dtype)
            if of_x is not None:
                of_x[rows] = of_logits @ weight
            if of_weight is not None:
                _add_product_(of_weight, of_logits.t(), x[rows])
        return of_x, None if of_weight is None else of_weight.to(weight.dtype), None, None


def _chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    rows = max(CHUNK_LOGITS // len(weight), 1)
    return (slice(start, start + rows) for start in range(0, len(x), rows))


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight.t()).float()


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to `total`, which is float32 for half-precision a and b: rounding each chunk's would add up."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:  # the CPU's products have no other type than their factors
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _columns(targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Where in this part of the vocabulary each target is, and whether it is there at all."""
    owned = (targets >= 0) & (targets < len(weight))
    return targets.clamp(0, len(weight) - 1), owned
