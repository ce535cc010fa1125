"""Matrices of which ranks hold parts: put together on one rank each, changed there, and given back.

A rank gives the part that it holds; the rank that a matrix goes to joins what data ranks and tensor ranks gave, and
sends everyone the part that they take. In a round each rank gets one matrix, so work and memory are spread evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gigatok_ds.engine.zero_stages import Place, ZeroStage, shape_on_this_rank
from gigatok_ds.parallel.sharding import TensorShard, declared_shards
from gigatok_ds.parallel.topology import Topology


class MatrixShare(NamedTuple):
    """What one rank holds of a matrix: elements of the flattened matrix of its tensor rank, as (start, size)."""

    tensor_rank: int
    gives: tuple[int, int]
    takes: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SpreadMatrix:
    """A matrix of `shape` (rows, columns) on each tensor rank, cut over them by `cut` (None: alike on all).

    `gives` and `takes` are this rank's places of what it sends and gets; `shares` are those of all ranks, by rank.
    """

    shape: tuple[int, ...]
    cut: TensorShard | None
    gives: Place
    takes: Place
    shares: list[MatrixShare]

    @property
    def full_shape(self) -> tuple[int, int]:
        """(rows, columns) of each of the matrices that are packed in the whole one."""
        rows, columns = self.cut.packed_shape(self.shape, self._tensor_size) if self.cut else self.shape
        return rows, columns

    @property
    def _tensor_size(self) -> int:
        return 1 + max(share.tensor_rank for share in self.shares)

    def changed(self, given: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """What ranks take, one after the other, of `change` of what they gave, one after the other."""
        parts: list[list[tuple[int, Tensor]]] = [[] for _ in range(self._tensor_size)]
        for share, part in zip(self.shares, given.split([share.gives[1] for share in self.shares]), strict=True):
            parts[share.tensor_rank].append((share.gives[0], part))
        local = [torch.cat([part for _, part in sorted(found, key=lambda each: each[0])]).view(self.shape)
                 for found in (parts if self.cut else parts[:1])]
        if self.cut is None:
            full = [change(local[0])] * self._tensor_size
        else:
            packed = self.cut.unshard(local).chunk(self.cut.groups, self.cut.dim)
            whole = torch.cat([change(matrix) for matrix in packed], self.cut.dim)
            full = [self.cut.shard(whole, rank, self._tensor_size) for rank in range(self._tensor_size)]
        flat = [each.flatten() for each in full]
        return torch.cat([flat[share.tensor_rank].narrow(0, *share.takes) for share in self.shares])


def exchange(matrices: Sequence[SpreadMatrix], parts: Sequence[Tensor], change: Callable[[Tensor], Tensor],
             topology: Topology) -> list[Tensor]:
    """What this rank takes of `change` of each matrix, flat, given its `parts` of them. Collective.

    There are at most as many matrices as ranks: the first rank changes the first, and so on.
    """
    idle = [0] * (topology.world_size - len(matrices))
    own = matrices[topology.rank] if topology.rank < len(matrices) else None
    gives, takes = ([getattr(matrix.shares[topology.rank], name)[1] for matrix in matrices]
                    for name in ("gives", "takes"))
    shares = own.shares if own else []
    none = [0] * (topology.world_size - len(shares))
    given = topology.exchange(torch.cat(list(parts)), gives + idle, [share.gives[1] for share in shares] + none)
    changed = own.changed(given, change) if own else given
    taken = topology.exchange(changed, [share.takes[1] for share in shares] + none, takes + idle)
    return list(taken.split(takes))


def rounds_of(zero: ZeroStage, names: Collection[str]) -> dict[int, list[list[SpreadMatrix]]]:
    """The parameters `names`, which are matrices, in rounds for `exchange`, for each call of the optimizer: by the id
    of every holder that DeepSpeed hands to that call. Collective."""
    topology, cuts = zero.topology, declared_shards(zero.network)
    # Of what tensor ranks hold alike the first gives.
    gives = {name: place for name, place in zero.places(share=True).items()
             if topology.tensor_rank == 0 or name in cuts}
    takes, known = zero.places(share=False), {id(parameter): name for name, parameter in zero.trained.items()}
    found: dict[int, list[list[SpreadMatrix]]] = {}
    for holders, parameters in zero.calls():
        called = [name for parameter in parameters if (name := known[id(parameter)]) in names]
        nothing = Place(holders[0], 0, 0, 0)
        own = {name: (gives.get(name, nothing), takes.get(name, nothing)) for name in called}
        everywhere = topology.gather_objects([
            MatrixShare(topology.tensor_rank, (given.start, given.size), (taken.start, taken.size))
            for given, taken in own.values()])
        matrices = [SpreadMatrix(shape=tuple(shape_on_this_rank(zero.trained[name])), cut=cuts.get(name), gives=given,
                                 takes=taken, shares=[shares[number] for shares in everywhere])
                    for number, (name, (given, taken)) in enumerate(own.items())]
        matrices.sort(key=lambda matrix: -matrix.shape[0] * matrix.shape[1])
        size = topology.world_size
        rounds = [matrices[start:start + size] for start in range(0, len(matrices), size)]
        found |= {id(holder): rounds for holder in holders}
    return found
