"""A measurement by all ranks of a job, written down by the first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gigatok_ds.evaluation.results import Results, check_results, write_results
from gigatok_ds.ownership import owned_by_first
from gigatok_ds.parallel.topology import Topology, join_ranks, stop_process_group


def measure_into(out: Path, device: str, measure: Callable[[Topology], Results]) -> Results | None:
    """Run `measure` on the ranks that the launcher started and write its results to `out`; None on all but the first.

    Raises InputError before anything is measured if `out` holds what is not of results, or belongs to another process.
    """
    topology = join_ranks(device)
    try:
        with owned_by_first(out, topology):
            if topology.is_first:
                check_results(out)
            results = measure(topology)
            if topology.is_first:
                write_results(out, results)
    finally:
        stop_process_group(topology)
    return results if topology.is_first else None
