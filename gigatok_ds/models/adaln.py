"""How a class shifts, scales and gates the blocks of a GPT (adaptive layer norm: Peebles & Xie 2022, arXiv:2212.09748).

A modulation is (batch, parts, width). A block has six parts: shift, scale and gate of the attention, then of the MLP;
the final norm has shift and scale. Without adaptive layer norm it is None everywhere.
"""

from __future__ import annotations

from torch import Tensor, nn


def adaptive_projection(width: int, parts: int) -> nn.Sequential:
    """SiLU, then a projection of the condition to a modulation; zero at first, so that a gated branch adds nothing."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def project(projection: nn.Sequential, condition: Tensor) -> Tensor:
    """The modulation (B, parts, width) that a condition (B, width) asks for."""
    return projection(condition).unflatten(-1, (-1, condition.shape[-1]))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (T, B, width) by shift and scale (B, width)."""
    return x * (1 + scale) + shift
