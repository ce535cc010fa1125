"""A few rows times a large matrix on a CPU, in float32: decoding, where a step reads every weight and uses it a few times.

Weights are laid out in panels that are read from end to end, and fetched ahead of their use, which is what makes it
faster than a library's product. Each result is a sum in one fixed order, whatever the number of rows and threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gigatok_ds.kernels.native import kernels_for

PANEL = 16  # output features side by side; see csrc/cpu.h


def has_few_row_product(like: Tensor) -> bool:
    """Whether there is a native kernel for float32 products on this tensor's device."""
    return like.dtype == torch.float32 and like.device.type == "cpu" and kernels_for(like) is not None


def in_panels(weight: Tensor) -> Tensor:
    """A weight (columns, depth) as (columns / PANEL rounded up, depth, PANEL), filled up with zeros."""
    surplus = -len(weight) % PANEL
    return F.pad(weight, (0, 0, 0, surplus)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def few_row_product(rows: Tensor, panels: Tensor, columns: int) -> Tensor:
    """rows (..., depth) times the transposed weight of `in_panels`: (..., columns), without gradient."""
    flat = rows.reshape(-1, rows.shape[-1]).contiguous()
    return torch.ops.gigatok_native.few_row_product(flat, panels, columns).unflatten(0, rows.shape[:-1])
