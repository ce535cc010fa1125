"""What DeepSpeed keeps of one network on each rank, by ZeRO stage; measured by benchmarks/zero_memory.py and
tests/planning/test_plan.py.

Rajbhandari et al. 2020, arXiv:1910.02054, sections 3.1 and 5, with what DeepSpeed 0.19.8 does otherwise: stages 1 to 3
keep float32 master weights beside parameters that are float32 already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gigatok_ds.dry_run.dry_run_result import NO_MATRICES, MuonWork

# DeepSpeed's own, where its settings do not say.
BUCKET = 500_000_000
PREFETCH = 50_000_000
LIVE = 1_000_000_000
PERSISTENT = 100_000

# Of the matrix that a rank orthogonalizes: parts and joined, iterates and their products, what is sent back.
_MATRIX_COPIES = 8


class EngineState(NamedTuple):
    """Bytes on one rank. All but the last three are there all the time.

    buckets: of the backward pass; gathered: parameters that ZeRO-3 has put together, in forward and backward; update:
    what an optimizer step needs for a moment.
    """

    parameters: float
    gradients: float
    master_weights: float
    moments: float
    average: float
    buckets: float
    gathered: float
    update: float

    @property
    def kept(self) -> float:
        return sum(self[:5])


def state_of(sizes: Sequence[int], frozen: Sequence[int] = (), *, zero: Mapping, data_ranks: int, precision: str,
             average: bool, muon: MuonWork = NO_MATRICES) -> EngineState:
    """The state of a network with parameters of so many elements each on a tensor rank, and frozen ones.

    zero: the section zero_optimization of DeepSpeed's settings. muon: those that have one moment.
    """
    elements, stage = sum(sizes), zero["stage"]
    low = 4 if precision == "fp32" else 2
    part = elements / data_ranks
    own = part if stage >= 1 else elements  # of the optimizer's
    has_masters = stage >= 1 or low == 2
    masters_update = _gradients_in_float32(own, stage, low) if has_masters else 0  # Adam's fused kernel needs nothing
    return EngineState(
        parameters=low * (elements + sum(frozen)) / (data_ranks if stage == 3 else 1),
        gradients=low * (part if stage >= 2 else elements),
        master_weights=4 * own if has_masters else 0,
        moments=8 * own - 4 * muon.elements * own / max(elements, 1),
        average=4 * part if average else 0,
        buckets=low * _buckets(zero),
        gathered=low * _gathered([*sizes, *frozen], zero) if stage == 3 else 0,
        update=masters_update + _MATRIX_COPIES * low * muon.largest,
    )


def _gradients_in_float32(elements: float, stage: int, low: int) -> float:
    """Bytes; stages 1 and 2 have them in one piece before, where that is another one."""
    return elements * (4 + low if stage in (1, 2) and low == 2 else 4)


def _buckets(zero: Mapping) -> int:
    size = int(zero.get("reduce_bucket_size", BUCKET))
    if zero["stage"] in (1, 2):
        return size * (1 + bool(zero.get("overlap_comm", False))) if zero.get("contiguous_gradients", True) else 0
    return size if zero["stage"] == 3 else 0


def _gathered(sizes: Sequence[int], zero: Mapping) -> int:
    """What may be used again soon stays; small parameters always do."""
    threshold = int(zero.get("stage3_param_persistence_threshold", PERSISTENT))
    live = min(int(zero.get("stage3_max_live_parameters", LIVE)), int(zero.get("stage3_max_reuse_distance", LIVE)))
    large = sum(size for size in sizes if size > threshold)
    ahead = int(zero.get("stage3_prefetch_bucket_size", PREFETCH)) + max(sizes, default=0)
    return min(large, max(live, ahead)) + sum(sizes) - large
