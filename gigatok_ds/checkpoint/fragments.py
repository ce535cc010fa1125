"""The saved state of one network under an optimizer, spread over files as it was spread over ranks, readable by any
layout.

A folder holds `engine.json`, which describes every tensor, and per tensor rank

    tensor-TTT-data-DDDDD.safetensors   a data rank's part of each flattened parameter: float32 weights, both Adam
                                        moments (of Muon's matrices the first), and the moving average where there is
                                        one, as `KIND/NAME`
    whole-tensor-TTT.safetensors        what data ranks share: buffers and frozen parameters, by name

A part says at which element of the flattened parameter it starts, so parts of any ZeRO stage and any number of ranks
fit together again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from gigatok_ds.checkpoint.tensor_files import LazyTensors, TensorFiles
from gigatok_ds.errors import InputError
from gigatok_ds.files import synced_sha256
from gigatok_ds.parallel.sharding import TensorShard
from gigatok_ds.plain import from_plain
from gigatok_ds.untrusted import brief, parse_json, read_bytes, reading

WEIGHTS, MOMENTS, EMA = "weights", ("exp_avg", "exp_avg_sq"), "ema"
DESCRIPTION_FILE = "engine.json"
MOST_RANKS = 2**20
_STARTS = "starts"


class Fragment(NamedTuple):
    """Part of a flattened parameter: float32 `values` (n,) from element `start` on."""

    start: int
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class SavedLayout:
    """How a saved network was spread: what `engine.json` holds.

    `parameters` gives each trained parameter's shape on one tensor rank; `cuts` says how those that are not alike on
    all tensor ranks are cut. `adam_steps` counts the updates of each parameter, and `counters` are the engine's own
    numbers.
    """

    tensor_size: int
    data_size: int
    parameters: dict[str, list[int]]
    cuts: dict[str, TensorShard]
    kinds: list[str]
    adam_steps: dict[str, int]
    counters: dict[str, float]

    def to_json(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> SavedLayout:
        """Raises InputError for anything that is not what `to_json` writes."""
        layout: SavedLayout = from_plain(cls, parse_json(text.encode(), DESCRIPTION_FILE), DESCRIPTION_FILE)
        for name, shape in layout.parameters.items():
            cut = layout.cuts.get(name, TensorShard())
            if min(shape, default=0) < 0 or cut.groups < 1 or not 0 <= cut.dim < max(len(shape), 1):
                raise InputError(f"{name} has the shape {shape}, cut along {cut.dim} in {cut.groups} groups")
        if not (1 <= layout.tensor_size <= MOST_RANKS and 1 <= layout.data_size <= MOST_RANKS):
            raise InputError(f"{layout.tensor_size} tensor ranks and {layout.data_size} data ranks are said to have "
                             "written it")
        return layout

    def numel(self, name: str) -> int:
        """Elements of a parameter on one tensor rank."""
        return math.prod(self.parameters[name])


@dataclass(kw_only=True)
class Snapshot:
    """What one rank writes down of a network: copies in host memory, by kind and parameter name, once `arrived`
    returns.
    """

    tensor_rank: int
    data_rank: int
    layout: SavedLayout
    fragments: dict[str, dict[str, Fragment]]
    full: dict[str, Tensor] = field(default_factory=dict)
    arrived: Callable[[], None] = lambda: None

    def write(self, folder: Path) -> dict[str, str]:
        """Write this rank's files below `folder`, and return the SHA-256 of each by its name."""
        folder.mkdir(parents=True, exist_ok=True)
        self.arrived()
        place = f"tensor-{self.tensor_rank:03d}"
        parts = {f"{kind}/{name}": part for kind, by_name in self.fragments.items() for name, part in by_name.items()}
        starts = json.dumps({key: part.start for key, part in parts.items()})
        values = {key: part.values for key, part in parts.items()}
        names = [f"{place}-data-{self.data_rank:05d}.safetensors"]
        save_file(values, folder / names[0], metadata={_STARTS: starts})
        if self.data_rank == 0:
            names.append(f"whole-{place}.safetensors")
            save_file(self.full, folder / names[-1])
        if (self.tensor_rank, self.data_rank) == (0, 0):
            names.append(DESCRIPTION_FILE)
            (folder / names[-1]).write_text(self.layout.to_json(), encoding="utf-8")
        return {name: synced_sha256(folder / name) for name in names}


class SavedEngine:
    """A folder that the `Snapshot`s of all ranks were written to. Tensors are read when they are asked for.

    Raises InputError, here and later, when a file is missing, damaged or does not fit the others.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / DESCRIPTION_FILE
        if not path.is_file():
            raise InputError(f"{folder} holds no training state: it has no {DESCRIPTION_FILE}")
        try:
            self.layout = SavedLayout.from_json(read_bytes(path).decode(errors="replace"))
        except InputError as error:
            raise InputError(f"{path} is damaged ({brief(error)})") from None
        self._files = TensorFiles()
        self._places: dict[int, dict[str, list[tuple[int, Path]]]] = {}
        self._starts: dict[Path, dict[str, int]] = {}

    def has(self, kind: str) -> bool:
        return kind in self.layout.kinds

    def pieces(self, kind: str, name: str) -> Iterator[tuple[int, int, Fragment]]:
        """(tensor rank, data rank, its part) of a parameter, as each rank has written it: of a replica, every copy."""
        for tensor_rank in range(self.layout.tensor_size):
            for start, path in self._index(tensor_rank).get(f"{kind}/{name}", ()):
                data_rank = int(path.stem.rpartition("-")[2])
                yield tensor_rank, data_rank, Fragment(start, self._files.read(path, f"{kind}/{name}"))

    def holds(self, kind: str, name: str) -> bool:
        """Whether there is something of that kind for a parameter."""
        return f"{kind}/{name}" in self._index(0)

    def tensors(self, kind: str = WEIGHTS) -> Mapping[str, Tensor]:
        """The whole network's state_dict, each tensor read when asked for: parameters of that kind, float32, and
        buffers.
        """
        full = set(self.full_names())
        return LazyTensors(self.shapes(), lambda name: self.read_full(name) if name in full else self.read(kind, name))

    def shapes(self) -> dict[str, list[int]]:
        """The shapes of all full tensors: trained parameters, frozen ones, buffers."""
        file = self._full_file(0)
        full = {name: self._joined_shape(name, self._files.shape(file, name)) for name in self.full_names()}
        return {name: self.shape(name) for name in self.layout.parameters} | full

    def shape(self, name: str) -> list[int]:
        """The shape of a full parameter."""
        return self._joined_shape(name, self.layout.parameters[name])

    def _joined_shape(self, name: str, local: list[int]) -> list[int]:
        cut = self.layout.cuts.get(name)
        return cut.full_shape(torch.Size(local), self.layout.tensor_size) if cut else local

    def read(self, kind: str, name: str) -> Tensor:
        """A whole parameter, or what the optimizer or the average has for it."""
        with reading(self.folder):
            return self._read(kind, name)

    def _read(self, kind: str, name: str) -> Tensor:
        cut, numel = self.layout.cuts.get(name), self.layout.numel(name)
        ranks = range(self.layout.tensor_size if cut else 1)
        parts = [self._range(rank, kind, name, 0, numel).reshape(self.layout.parameters[name]) for rank in ranks]
        return cut.unshard(parts) if cut else parts[0]

    def read_range(self, kind: str, name: str, start: int, stop: int, *, tensor_rank: int, tensor_size: int) -> Tensor:
        """Elements of the flattened parameter as tensor rank `tensor_rank` of `tensor_size` holds it: (stop - start,).
        """
        cut = self.layout.cuts.get(name)
        if cut is None or tensor_size == self.layout.tensor_size:  # of a replica, every rank's part is the same
            return self._range(tensor_rank if cut else 0, kind, name, start, stop)
        return cut.shard(self.read(kind, name), tensor_rank, tensor_size).flatten()[start:stop]

    def read_full(self, name: str, *, tensor_rank: int = 0, tensor_size: int = 1) -> Tensor:
        """A buffer or frozen parameter as that tensor rank holds it."""
        cut = self.layout.cuts.get(name)
        if cut is None:
            return self._files.read(self._full_file(0), name)
        with reading(self.folder):
            return self._joined(name, cut, tensor_rank, tensor_size)

    def _joined(self, name: str, cut: TensorShard, tensor_rank: int, tensor_size: int) -> Tensor:
        parts = [self._files.read(self._full_file(rank), name) for rank in range(self.layout.tensor_size)]
        return cut.shard(cut.unshard(parts), tensor_rank, tensor_size)

    def full_names(self) -> list[str]:
        return self._files.names(self._full_file(0))

    def _full_file(self, tensor_rank: int) -> Path:
        return self.folder / f"whole-tensor-{tensor_rank:03d}.safetensors"

    def _range(self, tensor_rank: int, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements from `start` to `stop` of what a saved tensor rank holds, from the parts of its data ranks."""
        parts, expected, key = [], start, f"{kind}/{name}"
        for begin, path in self._index(tensor_rank).get(key, ()):
            size = self._files.shape(path, key)[0]
            if begin + size <= expected or begin >= stop:
                continue
            if begin > expected:
                break
            parts.append(self._files.read(path, key, expected - begin, min(stop - begin, size)))
            expected = begin + size
        if expected < stop:
            raise InputError(f"{self.folder}: elements from {expected} on of {kind} of {name} are missing")
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def _index(self, tensor_rank: int) -> dict[str, list[tuple[int, Path]]]:
        """Where each tensor's parts start, and in which files, in order."""
        if tensor_rank not in self._places:
            found: dict[str, list[tuple[int, Path]]] = {}
            for data_rank in range(self.layout.data_size):
                path = self.folder / f"tensor-{tensor_rank:03d}-data-{data_rank:05d}.safetensors"
                for key in self._files.names(path):
                    found.setdefault(key, []).append((self._start(path, key), path))
            self._places[tensor_rank] = {key: sorted(parts) for key, parts in found.items()}
        return self._places[tensor_rank]

    def _start(self, path: Path, key: str) -> int:
        if path not in self._starts:
            starts = (self._files.metadata(path) or {}).get(_STARTS, "")
            said = parse_json(starts.encode(), f"{path}: where its parts start")
            self._starts[path] = from_plain(dict[str, int], said, str(path))
        if self._starts[path].get(key, -1) < 0:
            raise InputError(f"{path} is damaged: it does not say where {key} starts")
        return self._starts[path][key]
