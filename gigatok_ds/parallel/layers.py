"""The layers a model asks for instead of building them itself.

A model describes what it needs (a projection that may be cut by output features, one that may be cut by input
features, a table that may be cut by vocabulary); the factory decides what it gets. `PlainLayers` gives ordinary
torch modules and needs no process group.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn


class LayerFactory(Protocol):
    """What a model may ask for. Every layer maps (..., in_features) to (..., out_features)."""

    tensor_parallel_size: int

    def column(self, in_features: int, out_features: int, *, bias: bool, groups: int = 1) -> nn.Module:
        """A projection cut by output features; `groups` packed equal projections (q, k, v) are each cut alike."""

    def row(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """A projection of a cut input back to full features: the partner of `column`."""

    def vocab_embedding(self, vocab_size: int, width: int) -> nn.Module:
        """A table of `vocab_size` rows, cut by rows."""


class PlainLayers:
    """Ordinary torch layers: one process, or data parallelism only."""

    tensor_parallel_size = 1

    def column(self, in_features: int, out_features: int, *, bias: bool, groups: int = 1) -> nn.Linear:
        return nn.Linear(in_features, out_features, bias=bias)

    def row(self, in_features: int, out_features: int, *, bias: bool) -> nn.Linear:
        return nn.Linear(in_features, out_features, bias=bias)

    def vocab_embedding(self, vocab_size: int, width: int) -> nn.Embedding:
        return nn.Embedding(vocab_size, width)


PLAIN = PlainLayers()
