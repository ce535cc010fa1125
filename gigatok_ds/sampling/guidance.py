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


def guidance_scales(steps: int, cfg_scale: float, schedule: str, kwargs: dict | None = None,
                    interval: int = -1) -> list[float]:
    """The scale of each of `steps` generated codes; the first is always the full `cfg_scale`.

    1 is no guidance: for all codes with cfg_scale 1, and from an `interval` of 0 or more on for the codes after number
    interval + 1 (counted from 0). Raises InputError for a scale below 1 or without end, an unknown schedule, arguments
    that the schedule does not take or an interval below -1 (which is none).
    """
    if interval < -1:
        raise InputError(f"cfg_interval is {interval}; it must be the last guided step, or -1 for all of them")
    if not 1 <= cfg_scale < math.inf:
        raise InputError(f"cfg_scale is {cfg_scale}; it must be a finite number of at least 1 (1 means no guidance)")
    if schedule not in SCHEDULES:
        raise InputError(f"unknown cfg_schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    try:
        scales = [SCHEDULES[schedule](i / (steps - 1), cfg_scale, **(kwargs or {})) for i in range(1, steps)]
    except (TypeError, ZeroDivisionError) as error:
        raise InputError(f"cfg_schedule {schedule!r} with {kwargs or {}}: {error}") from None
    if not all(map(math.isfinite, [*scales, *(kwargs or {}).values()])):
        raise InputError(f"cfg_schedule {schedule!r} with {kwargs or {}} gives scales that are not finite")
    if cfg_scale == 1:
        return [1.0] * steps
    return [cfg_scale, *(1.0 if -1 < interval < i else scale for i, scale in enumerate(scales))]


def guide(logits: Tensor, scale: float | Tensor) -> Tensor:
    """Logits (2B, vocab), conditional half first, to guided logits (B, vocab): u + (c - u) * scale."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + (conditional - unconditional) * scale
