"""Training checkpoints of a run: `checkpoints/step-0001000/`, complete or ignored.

Each is written into a `.partial` directory next to it and renamed when everything is on disk; the newest one is
found by looking, so there is no `latest` file that could lie.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from gigatok_ds.errors import InputError
from gigatok_ds.parallel.topology import Topology

_NAME = re.compile(r"^step-(\d{7,})$")
STATE_FILE = "state.json"


class Saveable(Protocol):
    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:07d}"


def complete_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """All complete checkpoints of a run as (step, directory), oldest first."""
    found = []
    for folder in (run_dir / "checkpoints").glob("step-*"):
        match = _NAME.match(folder.name)
        if match and (folder / STATE_FILE).is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def save_checkpoint(run_dir: Path, step: int, parts: Mapping[str, Saveable], topology: Topology, *,
                    keep: int) -> None:
    """Save every part (an engine each) for `step`; afterwards only the newest `keep` checkpoints remain.

    Collective. A failure leaves the earlier checkpoints as they were and removes what was half-written. Raises
    InputError when the disk is full or cannot be written to.
    """
    final = checkpoint_path(run_dir, step)
    partial = final.with_name(final.name + ".partial")
    if topology.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    topology.barrier()
    try:
        for name, part in parts.items():
            part.save(partial / name)
        topology.barrier()
        if topology.is_first:
            state = {"step": step, "parts": sorted(parts), "world_size": topology.world_size,
                     "tensor_size": topology.tensor_size}
            (partial / STATE_FILE).write_text(json.dumps(state) + "\n")
            _flush(partial)
            if final.exists():
                shutil.rmtree(final)
            os.rename(partial, final)
            for _, old in complete_checkpoints(run_dir)[:-keep]:
                shutil.rmtree(old)
    except BaseException as error:
        if topology.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        if _is_write_failure(error):
            reason = getattr(error, "strerror", None) or "writing failed, probably for lack of space"
            raise InputError(f"the checkpoint of step {step} could not be written below {run_dir} ({reason}); earlier "
                             "checkpoints are untouched: make room and run the same command again") from error
        raise
    topology.barrier()


def _is_write_failure(error: BaseException) -> bool:
    """Operating-system errors, and those of torch's zip writer, which hides them in a RuntimeError."""
    hidden = ("PytorchStreamWriter", "inline_container")
    return isinstance(error, OSError) or isinstance(error, RuntimeError) and any(word in str(error) for word in hidden)


def load_checkpoint(folder: Path, parts: Mapping[str, Saveable], topology: Topology) -> int:
    """Restore every part and return the step to continue after. Raises InputError when it does not fit this run."""
    state = json.loads((folder / STATE_FILE).read_text())
    if state["parts"] != sorted(parts):
        raise InputError(f"{folder} holds {', '.join(state['parts'])}, but this recipe trains {', '.join(sorted(parts))}")
    if (state["world_size"], state["tensor_size"]) != (topology.world_size, topology.tensor_size):
        raise InputError(
            f"{folder} was written by {state['world_size']} ranks with parallel.tensor={state['tensor_size']}; resume "
            f"it so, not with {topology.world_size} ranks and parallel.tensor={topology.tensor_size}"
        )
    for name, part in parts.items():
        part.load(folder / name)
    return state["step"]


def _flush(folder: Path) -> None:
    """Force every file below `folder` to disk, so that the rename cannot overtake the data."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def newest_checkpoint(run_dir: Path) -> Path:
    """The newest complete checkpoint; InputError when the run has none."""
    found = complete_checkpoints(run_dir)
    if not found:
        raise InputError(f"{run_dir} holds no complete training checkpoint")
    return found[-1][1]
