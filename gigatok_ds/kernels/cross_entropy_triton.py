"""What `cross_entropy` does with the logits of a chunk, in one pass over them in each direction: for GPUs. Imports
Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # of a row at a time


def totals_and_picked(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of contiguous logits (R, V) log-sum-exp, and the logit of its target, 0 for a target outside of [0,
    V): float32.
    """
    rows, vocabulary = logits.shape
    totals, picked = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows:
        totals_kernel[(rows,)](logits, targets, totals, picked, vocabulary, COLUMNS=COLUMNS, num_warps=8)
    return totals, picked


def become_gradient_(logits: Tensor, targets: Tensor, totals: Tensor, gradient: Tensor) -> None:
    """Write (softmax - one of the target) x gradient (R,) over contiguous logits (R, V)."""
    rows, vocabulary = logits.shape
    if rows:
        grid = (rows, triton.cdiv(vocabulary, COLUMNS))
        gradient_kernel[grid](logits, targets, totals, gradient, vocabulary, COLUMNS=COLUMNS, num_warps=8)


@triton.jit
def totals_kernel(logits, targets, totals, picked, vocabulary, COLUMNS: tl.constexpr):
    """A row: each of its lanes keeps the highest of what it saw and the sum of exponentials below that, as Milakov and
    Gimelshein (2018, arXiv:1805.02867) do."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    lanes = tl.arange(0, COLUMNS)
    highest = tl.full([COLUMNS], float("-inf"), tl.float32)
    sums = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        inside = start + lanes < vocabulary
        value = tl.load(logits + start + lanes, inside, other=float("-inf")).to(tl.float32)
        # Not tl.maximum, which may leave a NaN out.
        higher = tl.where(value <= highest, highest, value)
        sums = tl.where(inside, sums * tl.exp(highest - higher) + tl.exp(value - higher), sums)
        highest = tl.where(inside, higher, highest)
    top = tl.max(highest, 0)
    total = tl.log(tl.sum(tl.where(sums == 0, 0.0, sums * tl.exp(highest - top)), 0)) + top
    target = tl.load(targets + row)
    owned = (target >= 0) & (target < vocabulary)
    tl.store(totals + row, total)
    tl.store(picked + row, tl.load(logits + target, owned, other=0.0).to(tl.float32))


@triton.jit
def gradient_kernel(logits, targets, totals, gradient, vocabulary, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < vocabulary
    place = logits + row * vocabulary + column
    value = tl.exp(tl.load(place, inside, other=0.0).to(tl.float32) - tl.load(totals + row))
    value = tl.where(column == tl.load(targets + row), value - 1.0, value)
    tl.store(place, value * tl.load(gradient + row), inside)
