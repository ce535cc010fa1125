"""In what order an epoch reads the samples: a pure function of seed and epoch.

The order of a data set that fits is drawn as a whole. Of a larger one it is computed, place by place, so that neither
memory nor the time to the first batch grows with the number of samples.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from gigatok_ds.streams import numpy_stream

HELD = 2**24  # samples, of 8 bytes in each rank
_ROUNDS = 8


class Locality(NamedTuple):
    """Samples are mixed with those of few tars: `counts` (M,) has how many each tar holds, in the order of the samples,
    and `mixed` tars are mixed at a time.
    """

    counts: np.ndarray
    mixed: int


class Order(Protocol):
    """Which sample comes at each place of an epoch."""

    def __getitem__(self, places: np.ndarray, /) -> np.ndarray:
        """The samples at these places, both int64 of one shape."""


class AsStored:
    """The order of the data."""

    def __getitem__(self, places: np.ndarray, /) -> np.ndarray:
        return places


class ComputedOrder:
    """A permutation of 0 ... count - 1 of which any place is found by itself, with `locality` as `epoch_order` says."""

    def __init__(self, count: int, draws: np.random.Generator, locality: Locality | None = None):
        self._keys = draws.integers(2**64, size=_ROUNDS, dtype=np.uint64)
        counts = np.array([count]) if locality is None else locality.counts
        group = np.zeros(1, np.int64) if locality is None else draws.permutation(len(counts)) // locality.mixed
        tars = np.argsort(group, kind="stable")
        # The tars in the order of the groups: where each ends, and how far from its place in the data it is.
        self._tar_ends = np.cumsum(counts[tars])
        self._shifts = (np.cumsum(counts) - counts)[tars] - (self._tar_ends - counts[tars])
        self._group_ends = np.cumsum(np.bincount(group, counts)).astype(np.int64)

    def __getitem__(self, places: np.ndarray, /) -> np.ndarray:
        groups, mixed = np.searchsorted(self._group_ends, places, side="right"), np.empty_like(places)
        for group in np.unique(groups).tolist():
            own, end = groups == group, int(self._group_ends[group])
            start = int(self._group_ends[group - 1]) if group else 0
            mixed[own] = start + permuted(places[own] - start, end - start, self._keys + np.uint64(group))
        tars = np.searchsorted(self._tar_ends, mixed, side="right")
        return mixed + self._shifts[tars]


def permuted(values: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """The places of `values` (int64, 0 ... count - 1) in a permutation that the round keys (uint64) choose.

    A Feistel network (Luby and Rackoff, 1988), a round to a key, permutes the next power of four; what falls outside is
    sent through again until it does not (cycle walking: Black and Rogaway, 2002).
    """
    half = np.uint64(max((count - 1).bit_length() + 1, 2) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    found, outside = values.astype(np.uint64), np.ones(values.shape, bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        found[outside] = left << half | right
        outside = found >= count
    return found.astype(np.int64)


def _mixed(bits: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every bit depends on every bit."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def epoch_order(count: int, seed: int, epoch: int, locality: Locality | None = None) -> Order:
    """The order of epoch `epoch`: a permutation of 0 ... count - 1, as an array (int64) of at most HELD samples.

    With `locality` the tars are put in a random order and cut into groups of `mixed`: the samples of a group come in a
    random order, before those of the next group.
    """
    draws = numpy_stream(seed, "order", epoch)
    if count > HELD:
        return ComputedOrder(count, draws, locality)
    order = draws.permutation(count)
    if locality is None:
        return order
    shards = np.repeat(np.arange(len(locality.counts)), locality.counts)
    groups = draws.permutation(int(shards.max()) + 1) // locality.mixed
    return order[np.argsort(groups[shards[order]], kind="stable")]
