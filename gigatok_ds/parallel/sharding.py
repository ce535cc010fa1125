"""The one rule of how a parameter is cut over tensor ranks.

A layer whose parameters may be cut says so in its attribute `shards`, a dictionary from the parameter's name in that
layer to a `TensorShard`. Initialisation, gathering and conversion read it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SHARDS = "shards"  # the attribute


@dataclass(frozen=True, kw_only=True)
class TensorShard:
    """Cut along `dim` into equal parts; `groups` packed tensors (q, k, v) along it are each cut by themselves."""

    dim: int = 0
    groups: int = 1

    def full_shape(self, local: Sequence[int], size: int) -> list[int]:
        """Shape of the whole tensor, given that of one of `size` equal parts."""
        return [n * size if axis == self.dim else n for axis, n in enumerate(local)]

    def packed_shape(self, local: Sequence[int], size: int) -> list[int]:
        """Shape of each of the packed tensors, whole, given that of one of `size` equal parts of all of them."""
        full = self.full_shape(local, size)
        full[self.dim] //= self.groups
        return full

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        """The part of `full` that tensor rank `rank` of `size` holds."""
        return torch.cat([group.chunk(size, self.dim)[rank] for group in full.chunk(self.groups, self.dim)], self.dim)

    def unshard(self, parts: list[Tensor]) -> Tensor:
        """The whole tensor from the parts of all tensor ranks, in rank order: the inverse of `shard`."""
        grouped = [part.chunk(self.groups, self.dim) for part in parts]
        return torch.cat([part[group] for group in range(self.groups) for part in grouped], self.dim)


def column_shards(*, bias: bool, groups: int = 1) -> dict[str, TensorShard]:
    """The shards of a projection cut by output features."""
    shard = TensorShard(groups=groups)
    return {"weight": shard, "bias": shard} if bias else {"weight": shard}


def row_shards() -> dict[str, TensorShard]:
    """The shards of a projection cut by input features; its bias is whole everywhere."""
    return {"weight": TensorShard(dim=1)}


def vocab_shards() -> dict[str, TensorShard]:
    """The shards of a table cut by rows."""
    return {"weight": TensorShard()}


def declared_shards(network: nn.Module) -> dict[str, TensorShard]:
    """Full parameter name to TensorShard, for every parameter that may be cut; all others are replicated."""
    return {
        f"{prefix}.{name}" if prefix else name: shard
        for prefix, module in network.named_modules()
        for name, shard in getattr(module, SHARDS, {}).items()
    }
