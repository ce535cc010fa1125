"""What a model asks for instead of knowing about ranks.

A model describes what it needs: projections and tables that may be cut over tensor ranks, modules that may see only
this rank's part of the images, tokens or heads, and the regions between parts and wholes. A `Layers` object decides
what it gets. `PLAIN` gives ordinary torch modules and needs no process group.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor, nn

from gigatok_ds.cluster.share import WHOLE, Share
from gigatok_ds.parallel.cross_entropy import head_cross_entropy
from gigatok_ds.parallel.dropout import AttentionDropout, Dropout
from gigatok_ds.parallel.partial import mark_partial
from gigatok_ds.parallel.reduce import RankMean
from gigatok_ds.parallel.sharding import SHARDS, TensorShard, column_shards, row_shards, vocab_shards

Module = TypeVar("Module", bound=nn.Module)


class Region(Protocol):
    """The way between a full tensor, alike on all tensor ranks, and this rank's part of it along the first axis."""

    def scatter(self, full: Tensor) -> Tensor: ...

    def gather(self, part: Tensor) -> Tensor: ...

    def copy(self, full: Tensor) -> Tensor:
        """The same tensor, which each rank is about to apply to its part: its gradient is summed over the ranks."""


class Layers(Protocol):
    """What a model may ask for. Projections map (..., in_features) to (..., out_features)."""

    @property
    def tensor_parallel_size(self) -> int: ...

    @property
    def images(self) -> Region:
        """The batch is cut around convolutions."""

    @property
    def tokens(self) -> Region:
        """Tokens are cut between attention and MLP under sequence parallelism."""

    def column(self, in_features: int, out_features: int, *, bias: bool, groups: int = 1) -> nn.Module:
        """A projection cut by output features; `groups` packed equal projections (q, k, v) are each cut alike."""

    def row(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """A projection of a cut input back to full features: the partner of `column`."""

    def vocab_embedding(self, vocab_size: int, width: int) -> nn.Module:
        """A table of `vocab_size` rows, cut by rows."""

    def vocab_head(self, width: int, vocab_size: int) -> nn.Module:
        """A `column` over a vocabulary: called with x it gives logits, with x and int64 targets their cross-entropy.

        The latter, float32 of the targets' shape and alike on all tensor ranks, never holds all logits.
        """

    def dropout(self, probability: float, *, hidden: bool = False) -> nn.Module:
        """Dropout of (tokens, batch, features): of the residual stream, or (hidden) between `column` and `row`."""

    def attention_dropout(self, probability: float) -> AttentionDropout:
        """Dropout of the probabilities (batch, heads, queries, keys) of this rank's attention heads."""

    def per_image(self, module: Module) -> Module:
        """`module`, which sees only this rank's images."""

    def per_token(self, module: Module) -> Module:
        """`module`, which sees only this rank's tokens under sequence parallelism."""

    def per_head(self, module: Module) -> Module:
        """`module`, which sees only this rank's attention heads."""

    def full_features(self, part: Tensor) -> Tensor:
        """The output of a `column` with the features of all tensor ranks."""

    def mean_over_data(self, x: Tensor) -> Tensor:
        """Mean over data ranks of a statistic of a data rank's batch."""

    def image_mean(self, *, all_data: bool) -> RankMean | None:
        """The mean over the ranks that share a data rank's images or, with all_data, over all; None if it is one."""


class _ReplicatedRegion:
    """One tensor rank has it all."""

    def scatter(self, full: Tensor) -> Tensor:
        return full

    def gather(self, part: Tensor) -> Tensor:
        return part

    def copy(self, full: Tensor) -> Tensor:
        return full


REPLICATED_REGION = _ReplicatedRegion()


class VocabHead(nn.Linear):
    """`Layers.vocab_head` of one tensor rank."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__(width, vocab_size, bias=False)
        self.shards = column_shards(bias=False)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        return super().forward(x) if targets is None else head_cross_entropy(x, self.weight, targets)


class PlainLayers:
    """Ordinary torch layers. `data_mean` averages over data ranks, when there are several."""

    tensor_parallel_size = 1
    images = tokens = REPLICATED_REGION

    def __init__(self, data_mean: RankMean | None = None):
        self.data_mean = data_mean

    def column(self, in_features: int, out_features: int, *, bias: bool, groups: int = 1) -> nn.Linear:
        return declared(nn.Linear(in_features, out_features, bias=bias), column_shards(bias=bias, groups=groups))

    def row(self, in_features: int, out_features: int, *, bias: bool) -> nn.Linear:
        return declared(nn.Linear(in_features, out_features, bias=bias), row_shards())

    def vocab_embedding(self, vocab_size: int, width: int) -> nn.Embedding:
        return declared(nn.Embedding(vocab_size, width), vocab_shards())

    def vocab_head(self, width: int, vocab_size: int) -> VocabHead:
        return VocabHead(width, vocab_size)

    def dropout(self, probability: float, *, hidden: bool = False) -> Dropout:
        return Dropout(probability)

    def attention_dropout(self, probability: float) -> AttentionDropout:
        return AttentionDropout(probability)

    def per_image(self, module: Module) -> Module:
        return module

    per_token = per_head = per_image

    def full_features(self, part: Tensor) -> Tensor:
        return part

    def mean_over_data(self, x: Tensor) -> Tensor:
        return self.data_mean(x) if self.data_mean else x

    def image_mean(self, *, all_data: bool) -> RankMean | None:
        return self.data_mean if all_data else None


class TensorParallelLayers:
    """What `Layers` over several tensor ranks have in common: which modules see a part of the data only."""

    def __init__(self, rank: int, size: int, *, sequence_parallel: bool):
        self.tensor_parallel_size, self.sequence_parallel = size, sequence_parallel
        self.part = Share(rank=rank, size=size)

    def dropout(self, probability: float, *, hidden: bool = False) -> Dropout:
        if hidden:
            return Dropout(probability, features=self.part)
        return Dropout(probability, tokens=self.part if self.sequence_parallel else WHOLE)

    def attention_dropout(self, probability: float) -> AttentionDropout:
        return AttentionDropout(probability, heads=self.part)

    def per_image(self, module: Module) -> Module:
        return mark_partial(module)

    def per_token(self, module: Module) -> Module:
        return mark_partial(module) if self.sequence_parallel else module

    def per_head(self, module: Module) -> Module:
        return mark_partial(module)


def declared(module: Module, shards: dict[str, TensorShard]) -> Module:
    """`module`, saying how its parameters would be cut."""
    setattr(module, SHARDS, shards)
    return module


PLAIN = PlainLayers()
