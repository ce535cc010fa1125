"""Learning-rate schedules as functions of the step. Steps count from 0; `total` is the length of the run."""

from __future__ import annotations

import math
from collections.abc import Callable

from gigatok_ds.config.recipe import ScheduleConfig

# How the cool-down of "wsd" falls from 1 to 0 over its own progress in [0, 1].
DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "sqrt": lambda progress: 1 - math.sqrt(progress),
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "square": lambda progress: 1 - progress**2,
}


def scheduled_lr(config: ScheduleConfig, base: float, total: int, step: int) -> float:
    """Learning rate at `step`.

    All kinds warm up from 1% of `base` over `warmup_steps`. Then cosine_v2 falls to `end_lr` at `total` and stays;
    cosine falls to 0; const stays; wsd (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395) stays until the
    last `decay_fraction` of the run and then falls to 0 in `decay_shape`.
    """
    if step < config.warmup_steps:
        share = step / config.warmup_steps
        return (share + (1 - share) / 100) * base
    if config.kind == "const":
        return base
    if config.kind == "wsd":
        hold = total - int(config.decay_fraction * total)
        if step < hold:
            return base
        progress = min((step - hold) / (total - hold), 1.0) if total > hold else 0.0
        return base * DECAY_SHAPES[config.decay_shape](progress)
    end = config.end_lr if config.kind == "cosine_v2" else 0.0
    if step >= total:
        return end
    progress = (step - config.warmup_steps) / (total - config.warmup_steps)
    return end + 0.5 * (base - end) * (1 + math.cos(math.pi * progress))


def lr_of_iteration(config: ScheduleConfig, base: float, total: int, iteration: int) -> float:
    """Learning rate used by iteration 0, 1, 2, ...

    The original sets the rate after each step, so iteration k uses the schedule at k - 1 and the very first
    iteration uses the base rate, un-warmed. We keep that.
    """
    return base if iteration == 0 else scheduled_lr(config, base, total, iteration - 1)
