"""An exponential moving average of a network's parameters, of which every data rank keeps its own part only.

Each rank averages the part of the float32 weights that it holds, or would hold, as a ZeRO partition; no rank ever has the
whole average. What is written down says which elements of which parameter it is, so that it can be put together again
whatever the stage and the number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gigatok_ds.errors import InputError
from gigatok_ds.parallel.sharding import declared_shards
from gigatok_ds.parallel.topology import Topology

_FOLDER = "ema"
_STARTS = "starts"


class Fragment(NamedTuple):
    """Part of a flattened parameter: float32 `values` (n,) from element `start` on."""

    start: int
    values: Tensor


class ShardedEMA:
    """ema = decay * ema + (1 - decay) * weights, from the weights as they are when it is made. Buffers are not averaged."""

    def __init__(self, decay: float, live: Callable[[], Mapping[str, Fragment]]):
        """live: this data rank's fragments of the weights by parameter name, as they are now; the same ones every time."""
        self.decay, self._live = decay, live
        self.fragments = {name: Fragment(start, values.detach().float().clone()) for name, (start, values) in live().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights once: after each update of theirs."""
        live = self._live()
        assert live.keys() == self.fragments.keys(), "the weights are partitioned otherwise than when the average began"
        if self.fragments:
            torch._foreach_lerp_([fragment.values for fragment in self.fragments.values()],
                                 [live[name].values.detach().float() for name in self.fragments], 1 - self.decay)

    def save(self, folder: Path, topology: Topology) -> None:
        """Write this rank's part below `folder`, in a file of its own."""
        path = _file(folder, topology.tensor_rank, topology.data_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        starts = {name: fragment.start for name, fragment in self.fragments.items()}
        save_file({name: fragment.values.contiguous() for name, fragment in self.fragments.items()}, path,
                  metadata={_STARTS: json.dumps(starts)})

    def load(self, folder: Path, topology: Topology) -> None:
        """Continue from what the same rank of the same layout saved. Raises InputError when it does not fit."""
        path = _file(folder, topology.tensor_rank, topology.data_rank)
        saved = _read(path)
        if {name: (start, len(values)) for name, (start, values) in saved.items()} != {
                name: (start, len(values)) for name, (start, values) in self.fragments.items()}:
            raise InputError(f"{path} is partitioned otherwise than this run; resume with the ZeRO stage it was written with")
        for name, fragment in self.fragments.items():
            fragment.values.copy_(saved[name].values)


def has_ema(folder: Path) -> bool:
    """Whether an engine saved below `folder` kept an average."""
    return (folder / _FOLDER).is_dir()


def read_ema(folder: Path, network: nn.Module) -> dict[str, Tensor]:
    """The averaged parameters that all ranks saved below `folder`, whole and float32, by name.

    `network` is one like the saved one without tensor parallelism, on any device. Raises InputError when a part is missing.
    """
    ranks = sorted({path.name.partition("-data-")[0] for path in (folder / _FOLDER).glob("tensor-*.safetensors")})
    if not ranks:
        raise InputError(f"{folder} holds no averaged weights: the run had training.ema_decay=null")
    shards = declared_shards(network)
    by_rank = [_read_tensor_rank(folder / _FOLDER, rank) for rank in ranks]
    whole = {}
    for name, parameter in network.named_parameters():
        shard, shape = shards.get(name), list(parameter.shape)
        if shard:
            shape[shard.dim] //= len(ranks)
        parts = [_joined(fragments.get(name, []), shape, f"{folder}: {name}") for fragments in by_rank]
        whole[name] = shard.join(parts) if shard else parts[0]
    return whole


def _joined(fragments: list[Fragment], shape: list[int], what: str) -> Tensor:
    """The parameter of that shape from its parts, which must follow one another without a gap."""
    expected = 0
    for start, values in sorted(fragments, key=lambda fragment: fragment.start):
        if start != expected:
            break
        expected += len(values)
    if expected != torch.Size(shape).numel():
        raise InputError(f"{what}: elements from {expected} on are missing from the averaged weights, or do not fit")
    return torch.cat([values for _, values in sorted(fragments, key=lambda fragment: fragment.start)]).reshape(shape)


def _read_tensor_rank(folder: Path, rank: str) -> dict[str, list[Fragment]]:
    found: dict[str, list[Fragment]] = {}
    for path in sorted(folder.glob(f"{rank}-data-*.safetensors")):
        for name, fragment in _read(path).items():
            found.setdefault(name, []).append(fragment)
    return found


def _read(path: Path) -> dict[str, Fragment]:
    try:
        return dict(_fragments(path))
    except (FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is missing or damaged ({' '.join(str(error).split())[:160]})") from None


def _fragments(path: Path) -> Iterator[tuple[str, Fragment]]:
    with safe_open(path, framework="pt") as file:
        starts = json.loads(file.metadata()[_STARTS])
        for name in file.keys():
            yield name, Fragment(starts[name], file.get_tensor(name))


def _file(folder: Path, tensor_rank: int, data_rank: int) -> Path:
    return folder / _FOLDER / f"tensor-{tensor_rank:03d}-data-{data_rank:05d}.safetensors"
