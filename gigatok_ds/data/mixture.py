"""Training samples from several sources in given proportions: which sample comes when is a function of seed and step.

Positions of the endless stream are dealt out in blocks of a thousand. Of the first n blocks' positions, N together,
source k has floor(N c_k) - floor(N c_(k-1)), with c_k the share of the first k sources together, so that no share is
off by more than one sample; in what order the sources come within a block is drawn. A source's own samples come in
epochs of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np

from gigatok_ds.data.order import AsStored, Locality, Order, epoch_order
from gigatok_ds.streams import numpy_stream, stream_key

_BLOCK = 1000  # positions


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How many samples each source has, one after the other in the joined data, and their weights."""

    counts: Sequence[int]
    weights: Sequence[float]


class MixedBatches:
    """As GlobalBatches, of a mixture: global batches, each found from its number alone, of samples of the joined data.
    """

    def __init__(self, mixture: Mixture, global_batch_size: int, seed: int, shuffle: bool = True,
                 locality: Locality | None = None):
        self.mixture, self.global_batch_size, self.seed, self.shuffle = mixture, global_batch_size, seed, shuffle
        self.count = sum(mixture.counts)
        self.starts = [0, *accumulate(mixture.counts)]
        weights = [Fraction(str(weight)) for weight in mixture.weights]
        self._shares = [Fraction(0), *(part / sum(weights) for part in accumulate(weights))]
        self._localities = [locality and _of_rows(locality, start, end) for start, end in pairwise(self.starts)]
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._orders: dict[int, dict[int, Order]] = {}  # by source and epoch

    def batch(self, step: int) -> np.ndarray:
        """The samples of global batch number `step`: int64 (global_batch_size,)."""
        return self.locate(step)[1]

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, of the source in global batch number `step` that has been read least often."""
        return int(self.locate(step)[0].min())

    def locate(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples) of global batch number `step`, both int64 (global_batch_size,): a sample's epoch is its
        source's.
        """
        first = step * self.global_batch_size
        sources, ordinals = self._dealt(first, first + self.global_batch_size)
        epochs, samples = np.zeros_like(ordinals), np.zeros_like(ordinals)
        for source in np.unique(sources).tolist():
            own = sources == source
            epochs[own], offsets = np.divmod(ordinals[own], self.mixture.counts[source])
            for epoch, order in self._orders_of(source, np.unique(epochs[own]).tolist()).items():
                here = epochs[own] == epoch
                samples[np.flatnonzero(own)[here]] = self.starts[source] + order[offsets[here]]
        return epochs, samples

    def _dealt(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Whose each of the positions first ... end - 1 is, and how many that source has had before."""
        blocks = range(first // _BLOCK, (end - 1) // _BLOCK + 1)
        self._blocks = {block: self._blocks[block] if block in self._blocks else self._block(block) for block in blocks}
        sources, ordinals = (np.concatenate([self._blocks[block][part] for block in blocks]) for part in (0, 1))
        window = slice(first - blocks[0] * _BLOCK, end - blocks[0] * _BLOCK)
        return sources[window], ordinals[window]

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        before, after = self._had(block * _BLOCK), self._had((block + 1) * _BLOCK)
        own = [now - then for then, now in zip(before, after, strict=True)]
        sources = np.repeat(np.arange(len(own)), own)
        ordinals = np.concatenate([np.arange(then, now) for then, now in zip(before, after, strict=True)])
        order = numpy_stream(self.seed, "mixture", block).permutation(_BLOCK)
        dealt, in_turn = sources[order], np.empty_like(ordinals)
        in_turn[np.argsort(dealt, kind="stable")] = ordinals  # each source's own samples in their order
        return dealt, in_turn

    def _had(self, positions: int) -> list[int]:
        """How many of the first so many positions each source has."""
        ends = [positions * share.numerator // share.denominator for share in self._shares]
        return [end - start for start, end in pairwise(ends)]

    def _orders_of(self, source: int, epochs: list[int]) -> dict[int, Order]:
        """The orders of these epochs of a source, which are kept until it is in others."""
        kept = self._orders.get(source, {})
        self._orders[source] = {epoch: kept[epoch] if epoch in kept else self._order(source, epoch) for epoch in epochs}
        return self._orders[source]

    def _order(self, source: int, epoch: int) -> Order:
        count = self.mixture.counts[source]
        if not self.shuffle:
            return AsStored()
        return epoch_order(count, stream_key(self.seed, "mixture", "source", source), epoch, self._localities[source])


def _of_rows(locality: Locality, start: int, end: int) -> Locality:
    """The tars that hold the samples start ... end - 1."""
    ends = np.cumsum(locality.counts)
    first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, end)
    return Locality(locality.counts[first : last + 1], locality.mixed)
