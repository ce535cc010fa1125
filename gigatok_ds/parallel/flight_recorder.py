"""PyTorch's record of the latest collectives of this process: which one a rank waits in, that is, while it hangs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

_SIZE = "TORCH_FR_BUFFER_SIZE"  # PyTorch reads it when the first process group is made
_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")  # of gloo, of NCCL
KEPT = 200


def switch_on() -> None:
    """Have collectives recorded, from the next process group on; a size that the user has set stays."""
    os.environ.setdefault(_SIZE, str(KEPT))


def last_collectives(count: int = 3) -> list[str]:
    """The latest collectives that this process has begun, a line each, newest last; none where PyTorch does not tell.
    """
    entries = sorted(_entries(), key=lambda entry: entry["time_created_ns"])
    return [_line(entry) for entry in entries[-count:]]


def _entries() -> Iterator[dict[str, Any]]:
    from torch._C import _distributed_c10d

    for dump in _DUMPS:
        # Not part of PyTorch's promises: a version without it must not spoil the report of a stall.
        with contextlib.suppress(AttributeError, RuntimeError, ValueError, TypeError):
            yield from json.loads(getattr(_distributed_c10d, dump)()).get("entries", [])


def _line(entry: dict[str, Any]) -> str:
    sizes = ", ".join("x".join(map(str, size)) for size in entry.get("input_sizes", [])) or "no tensor"
    state = "finished" if entry.get("retired") or entry.get("state") == "completed" else "not finished"
    return (f"{entry['profiling_name']} of {sizes}, number {entry['collective_seq_id']} in group "
            f"{entry['process_group'][1]}: {state}")
