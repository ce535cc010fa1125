"""Rotary positions on a grid (LlamaGen, Sun et al. 2024, arXiv:2406.06525), after a class token."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(grid: int, head_dim: int, device: torch.device) -> Tensor:
    """What `rotate` multiplies with, float32 (1 + grid^2, 2, head_dim): of the class, then of the grid's cells row by
    row.

    Each pair has its cosine twice, and its sine with either sign. The first half of the pairs turns with the row, the
    second with the column. The class's entry is zero, which makes
    its query and key vanish: LlamaGen's property, kept because its weights expect it.
    """
    half = head_dim // 2
    # In float64 on the CPU, so that every device gets the same.
    frequencies = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64, device="cpu") / half)
    angles = torch.arange(grid, dtype=torch.float64, device="cpu")[:, None] * frequencies
    shape = (grid, grid, half // 2)
    cells = torch.cat([angles[:, None].expand(shape), angles.expand(shape)], dim=-1).flatten(0, 1)
    sines = torch.stack([-cells.sin(), cells.sin()], dim=-1).flatten(-2)
    table = torch.stack([cells.cos().repeat_interleave(2, -1), sines], dim=1)
    return torch.cat([torch.zeros_like(table[:1]), table]).float().to(device)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs (x[2i], x[2i + 1]) of (B, heads, T, head_dim) by table rows (T, 2, head_dim), in float32."""
    cosine, sine = rotation.unbind(1)
    across = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cosine, across, sine).to(x.dtype)
