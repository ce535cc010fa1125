"""Time on the device."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch

from acceptance.section import Setting


def seconds_of(function: Callable[[], object], setting: Setting, *, repeats: int = 20, warm_up: int = 3) -> float:
    """Median seconds of a call: by CUDA events on a GPU, where calls run on while they are timed, by the clock
    elsewhere.
    """
    if setting.quick:
        repeats, warm_up = 2, 1
    for _ in range(warm_up):
        function()
    if not setting.on_gpu:
        return statistics.median(_by_the_clock(function) for _ in range(repeats))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        function()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events))


def _by_the_clock(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
