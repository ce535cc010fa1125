"""Training checkpoints of a run: `checkpoints/step-0001000/`, complete or ignored.

A checkpoint is complete when its directory has that name and holds `state.json`, which is written last and lists every
file with its SHA-256. The newest one is found by looking; the file `latest` beside them names it for people and
scripts, is replaced after it is complete, and is never read here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gigatok_ds.checkpoint.fragments import Snapshot
from gigatok_ds.errors import InputError
from gigatok_ds.files import sha256
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.plain import from_plain
from gigatok_ds.untrusted import brief, read_json

FORMAT = "gigatok-ds-training/1"
STATE_FILE = "state.json"
DATA_FILE = "data.json"  # what tells the data of a run from any other; see training.data_record
RECIPE_FILE = "recipe.yaml"  # of a run and of each of its checkpoints
# The engine that trains what is exported, by kind of recipe.
MODEL_PARTS = {"tokenizer": "generator", "gpt": "gpt"}
LATEST_FILE = "latest"
SEEN_SECONDS = 60.0  # how long a rank waits to see a checkpoint that the first rank sees
PARTIAL, REMOVED = ".partial", ".removed"
_NAME = re.compile(r"^step-(\d{7,})$")


class Saveable(Protocol):
    def snapshot(self) -> Snapshot: ...

    def load(self, folder: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class State:
    """What `state.json` says of a checkpoint.

    The position in the data and all random streams follow from `step` and the recipe; `samples` were seen so far.
    `metrics` are the validation figures of that step, if it was validated. `guard` is what decisions about the next
    steps depend on (resilience.step_guard). `files` maps paths to SHA-256.
    """

    step: int
    samples: int
    parts: list[str]
    world_size: int
    tensor_size: int
    stage: int
    metrics: dict[str, float]
    guard: dict[str, object]
    files: dict[str, str]

    def to_json(self) -> str:
        data = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps({**data, "sha256": _digest(data)}, indent=1) + "\n"


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path) -> State:
    """Raises InputError when the checkpoint is incomplete or its state.json is damaged."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise InputError(f"{folder} is not a complete training checkpoint: it has no {STATE_FILE}")
    try:
        data = read_json(path)
        said = data.pop("sha256", None)
        if data.get("format") == FORMAT and said == _digest(data):
            del data["format"]
            return _checked(from_plain(State, data, STATE_FILE))
        problem = f"its checksum is wrong, or it is not a {FORMAT}"
    except InputError as error:
        problem = brief(error)
    raise InputError(f"{path} is damaged ({problem}); remove {folder} to continue from an earlier checkpoint")


def _checked(state: State) -> State:
    """InputError for what would make no sense later."""
    if (
        state.step < 0
        or state.samples < 0
        or not 1 <= state.tensor_size <= state.world_size
        or state.stage not in range(4)
    ):
        raise InputError(f"step {state.step}, samples {state.samples}, {state.world_size} ranks, tensor "
                         f"{state.tensor_size}, stage {state.stage}")
    for part in state.parts:
        if part != Path(part).name or not part.strip("."):
            raise InputError(f"a part is called {part!r}")
    return state


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:07d}"


def partial_path(final: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return final.with_name(final.name + PARTIAL)


def complete_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """All complete checkpoints of a run as (step, directory), oldest first."""
    found = []
    for folder in (run_dir / "checkpoints").glob("step-*"):
        match = _NAME.match(folder.name)
        if match and (folder / STATE_FILE).is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def newest_checkpoint(run_dir: Path) -> Path:
    """The newest complete checkpoint; InputError when the run has none."""
    found = complete_checkpoints(run_dir)
    if not found:
        raise InputError(f"{run_dir} holds no complete training checkpoint")
    return found[-1][1]


def remove_leftovers(run_dir: Path) -> None:
    """Delete what a process that was killed left half-written or half-removed."""
    for folder in (run_dir / "checkpoints").glob("step-*"):
        if folder.name.endswith((PARTIAL, REMOVED)):
            shutil.rmtree(folder, ignore_errors=True)


def damaged_file(folder: Path, state: State, part: str | None = None, *, share: int = 0, of: int = 1) -> str | None:
    """What is wrong with the first file that is not as it was written, or None.

    Looks at one share of the files out of `of`; with a part, at what belongs to that or to no part.
    """
    others = tuple(f"{other}/" for other in state.parts if part is not None and other != part)
    for name in sorted(name for name in state.files if not name.startswith(others))[share::of]:
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"{folder / STATE_FILE} names {name!r}, which is outside of the checkpoint"
        if not path.is_file():
            return f"{path} is missing"
        if sha256(path) != state.files[name]:
            return f"{path} is damaged: its SHA-256 is not the one it was written with"
    return None


def damage(folder: Path, topology: Topology) -> str | None:
    """What is wrong with a checkpoint, and what to do, alike on all ranks; None when all of it is as it was written.

    Collective. A rank that does not see it yet, on a file system whose hosts lag behind each other, waits for it.
    """
    return next(filter(None, topology.gather_objects(_own_share_of_damage(folder, topology))), None)


def _own_share_of_damage(folder: Path, topology: Topology) -> str | None:
    deadline = time.monotonic() + SEEN_SECONDS
    while topology.world_size > 1 and not (folder / STATE_FILE).is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    try:
        problem = damaged_file(folder, read_state(folder), share=topology.rank, of=topology.world_size)
    except InputError as error:
        return str(error)
    return problem and f"{problem}; restore it from a copy, or remove {folder} to continue from an earlier checkpoint"


def load_checkpoint(folder: Path, parts: Mapping[str, Saveable], topology: Topology) -> State:
    """Check every file, restore every part, and return what to continue after. Collective.

    It may have been written by any number of ranks, tensor ranks and at any ZeRO stage. Raises InputError when a file
    is damaged or the checkpoint is of another kind of run.
    """
    problem = damage(folder, topology)
    if problem:
        raise InputError(problem)
    return restore(folder, parts)


def restore(folder: Path, parts: Mapping[str, Saveable]) -> State:
    """The same without looking for damage."""
    state = read_state(folder)
    if state.parts != sorted(parts):
        raise InputError(f"{folder} holds {', '.join(state.parts)}, but this recipe trains {', '.join(sorted(parts))}")
    for name, part in parts.items():
        part.load(folder / name)
    return state
