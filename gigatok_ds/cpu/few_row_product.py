"""A few rows times a large matrix, in float32 on a CPU: decoding, where a step uses every weight a few times.

Weights are laid out in panels that are read from end to end, and fetched ahead of their use, which makes it faster than
oneDNN's product of up to about 32 rows (of 128 it is slower). Each result is a sum in one fixed order, whatever the
number of rows and threads. It is for processors with AVX-512.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gigatok_ds.kernels.native import kernels_on

PANEL = 16  # output features side by side; see csrc/cpu.h


def has_few_row_product(like: Tensor) -> bool:
    """Whether there is a native kernel for products of this type on this device."""
    kernels = kernels_on("cpu") if like.device.type == "cpu" and like.dtype == torch.float32 else None
    return kernels is not None and kernels.cpu_capability() == "avx512"


def in_panels(weight: Tensor) -> Tensor:
    """A weight (columns, depth) as (columns / PANEL rounded up, depth, PANEL), filled up with zeros."""
    surplus = -len(weight) % PANEL
    return F.pad(weight, (0, 0, 0, surplus)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def few_row_product(rows: Tensor, panels: Tensor, columns: int) -> Tensor:
    """rows (..., depth) times the transposed weight of `in_panels`: (..., columns), without gradient."""
    flat = rows.reshape(-1, rows.shape[-1]).contiguous()
    return torch.ops.gigatok_native.few_row_product(flat, panels, columns).unflatten(0, rows.shape[:-1])
