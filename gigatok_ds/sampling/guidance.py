"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) and how its scale moves over the sequence."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from gigatok_ds.errors import InputError

# Just above 1: guidance that is "off" still mixes by this much, as in the original, so parity holds.
OFF = 1.0001

# Each schedule maps (progress r in (0, 1], scale g, its keyword arguments) to the scale of one step.


def constant(r: float, g: float) -> float:
    return g


def linear(r: float, g: float) -> float:
    return 1 + (g - 1) * r + 1e-4


def linear_re(r: float, g: float) -> float:
    """Linear, reversed: from g down to 1."""
    return 1 + (g - 1) * (1 - r) + 1e-4


def triangular(r: float, g: float, *, peak: float = 0.5) -> float:
    rising = r / peak if r < peak else (1 - r) / (1 - peak)
    return 1 + (g - 1) * rising + 1e-4


def rectangular(r: float, g: float, *, window_start: float = 0.05, window_end: float = 1.0) -> float:
    return g if window_start <= r <= window_end else OFF


def step(r: float, g: float, *, window_start: float) -> float:
    """Off, then on from `window_start`: GigaTok evaluates with window_start 0.18."""
    return g if window_start <= r else OFF


def cosine(r: float, g: float) -> float:
    return 1 + (g - 1) * 0.5 * (1 + math.cos(math.pi * r))


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "linear_re": linear_re,
    "triangular": triangular,
    "rectangular": rectangular,
    "step": step,
    "cosine": cosine,
}


def guidance_scales(steps: int, cfg_scale: float, schedule: str, kwargs: dict | None = None) -> list[float]:
    """The scale of each of `steps` generated codes; the first is always the full `cfg_scale`.

    Without guidance (cfg_scale 1) every scale is 1. Raises InputError for a scale below 1, an unknown schedule or
    arguments that the schedule does not take.
    """
    if cfg_scale < 1:
        raise InputError(f"cfg_scale is {cfg_scale}; it must be at least 1 (1 means no guidance)")
    if schedule not in SCHEDULES:
        raise InputError(f"unknown cfg_schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    try:
        scales = [SCHEDULES[schedule](i / (steps - 1), cfg_scale, **(kwargs or {})) for i in range(1, steps)]
    except TypeError as error:
        raise InputError(f"cfg_schedule {schedule!r} with {kwargs or {}}: {error}") from None
    return [1.0] * steps if cfg_scale == 1 else [cfg_scale, *scales]


def guide(logits: Tensor, scale: float) -> Tensor:
    """Logits (2B, vocab), conditional half first, to guided logits (B, vocab): u + (c - u) * scale."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + (conditional - unconditional) * scale
