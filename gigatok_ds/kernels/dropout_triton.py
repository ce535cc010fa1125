"""`dropout_mask.dropped` in one kernel for GPUs. Imports Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gigatok_ds.kernels.dropout_mask import FEATURE, MIX, SAMPLE, TOKEN, signed

_SAMPLE, _TOKEN, _FEATURE = (tl.constexpr(signed(number)) for number in (SAMPLE, TOKEN, FEATURE))
_MIX_0, _MIX_1 = (tl.constexpr(signed(number)) for number in MIX)
VALUES = 2048  # of a program


def drop(x: Tensor, samples: Tensor, rule: Tensor, token: int, feature: int, per_sample: bool) -> Tensor:
    """As `dropout_mask.dropped`, for contiguous x of at most 32 bits a value."""
    tokens, batch, width = x.shape
    out = torch.empty_like(x)
    if x.numel():
        columns = min(triton.next_power_of_2(width), VALUES)
        rows = VALUES // columns
        grid = (triton.cdiv(tokens * batch, rows), triton.cdiv(width, columns))
        drop_kernel[grid](x, out, samples, rule, tokens * batch, batch, width, token, feature, PER_SAMPLE=per_sample,
                          ROWS=rows, COLUMNS=columns)
    return out


@triton.jit(do_not_specialize=["count", "token", "feature"])
def drop_kernel(x, out, samples, rule, count, batch, width, token, feature, PER_SAMPLE: tl.constexpr,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS x COLUMNS of the `count` rows (token, sample) and `width` features."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sample = tl.load(samples + row % batch, row < count, other=0)
    hashed = _mixed(sample.to(tl.int32) * _SAMPLE + (sample >> 32).to(tl.int32) * _TOKEN + tl.load(rule))
    tokens = token + (row * 0 if PER_SAMPLE else row // batch).to(tl.int32)
    features = feature + (column * 0 if PER_SAMPLE else column)
    cell = _mixed(hashed + tokens * _TOKEN)[:, None]
    kept = _mixed(cell ^ _mixed(features * _FEATURE)[None, :]) >= tl.load(rule + 1)
    scale = tl.load(rule + 2).to(tl.float32, bitcast=True)
    place = row[:, None] * width + column[None, :]
    inside = (row < count)[:, None] & (column < width)[None, :]
    value = tl.load(x + place, inside, other=0.0).to(tl.float32) * tl.where(kept, scale, 0.0)
    tl.store(out + place, value, inside)


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16 & 0xFFFF)) * _MIX_0
    x = (x ^ (x >> 16 & 0xFFFF)) * _MIX_1
    return x ^ (x >> 15 & 0x1FFFF)
