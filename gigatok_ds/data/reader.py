"""Which sample is read when: a pure function of seed and step, whatever the ranks, workers and restarts.

Samples form one endless stream of global positions 0, 1, 2, ...; global batch number s covers the positions s
* G ... s * G + G - 1. Every epoch is a fresh permutation of the data, or of groups of its tars.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from gigatok_ds.cluster.share import WHOLE, Share
from gigatok_ds.data.order import AsStored, Locality, Order, epoch_order
from gigatok_ds.errors import InputError


class SampleAddress(NamedTuple):
    """One reading of a sample: its position in the endless stream, the epoch, and the sample's number."""

    position: int
    epoch: int
    sample: int


class GlobalBatches:
    """The global batches of a run, each found from its number alone.

    With `drop_last` an epoch ends with its last whole batch, and what is left over is not read in that epoch;
    without it a batch may begin in one epoch and end in the next, and nothing is left over. All batches have
    the same size. Raises InputError when there are fewer samples than one batch takes.
    """

    def __init__(self, count: int, global_batch_size: int, seed: int, shuffle: bool = True,
                 drop_last: bool = True, locality: Locality | None = None):
        if not 1 <= global_batch_size <= count:
            raise InputError(f"training.global_batch_size is {global_batch_size}, the data has {count} "
                             f"samples; set training.global_batch_size to 1 ... {count}")
        self.count = count
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.locality = locality
        self.epoch_length = count // global_batch_size * global_batch_size if drop_last else count
        self._orders: dict[int, Order] = {}

    def batch(self, step: int) -> np.ndarray:
        """The samples of global batch number `step`, counted from 0 over all epochs: int64
        (global_batch_size,).
        """
        return self.locate(step)[1]

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that global batch number `step` begins in."""
        return step * self.global_batch_size // self.epoch_length

    def locate(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples) of global batch number `step`, both int64 (global_batch_size,)."""
        positions = step * self.global_batch_size + np.arange(self.global_batch_size)
        epochs, offsets = np.divmod(positions, self.epoch_length)
        needed = range(int(epochs[0]), int(epochs[-1]) + 1)
        kept = self._orders
        self._orders = {epoch: kept[epoch] if epoch in kept else self._order(epoch) for epoch in needed}
        samples = np.concatenate([self._orders[epoch][offsets[epochs == epoch]] for epoch in needed])
        return epochs, samples

    def _order(self, epoch: int) -> Order:
        if not self.shuffle:
            return AsStored()
        return epoch_order(self.count, self.seed, epoch, self.locality)


def micro_steps(global_batch_size: int, data_size: int, micro_batch: int) -> int:
    """How many micro batches each rank takes from a global batch; InputError when they do not fill it."""
    if micro_batch < 1 or global_batch_size % (data_size * micro_batch):
        raise InputError(f"training.global_batch_size {global_batch_size} is not a multiple of {data_size} "
                         f"data-parallel ranks x micro batch {micro_batch}; change training.micro_batch_size "
                         "or training.global_batch_size")
    return global_batch_size // (data_size * micro_batch)


def rank_slice(batch: np.ndarray, share: Share, micro_batch: int, micro_index: int) -> np.ndarray:
    """The part of a global batch that one rank takes in one micro step: (micro_batch,).

    Micro step m of rank r takes the positions (m * share.size + r) * micro_batch onwards. The parts put
    together, micro steps outside and ranks inside, are the batch in its order, so that layouts with the same
    share.size x micro_batch even agree on every micro step. Raises InputError when the parts do not fill the
    batch.
    """
    steps = micro_steps(len(batch), share.size, micro_batch)
    assert 0 <= share.rank < share.size and 0 <= micro_index < steps
    start = (micro_index * share.size + share.rank) * micro_batch
    return batch[start : start + micro_batch]


@dataclass(frozen=True, kw_only=True)
class ReadingPlan:
    """Which micro batches one reader takes: those of global batch `start_step` (0-based) on.

    Readers share out each global batch. Without `stop_step`, which is not read any more, there is no end.
    """

    global_batch_size: int
    micro_batch_size: int
    share: Share = WHOLE
    start_step: int = 0
    stop_step: int | None = None
    shuffle: bool = True

    @property
    def micro_steps(self) -> int:
        """How many consecutive micro batches are the reader's share of one global batch; see `micro_steps`."""
        return micro_steps(self.global_batch_size, self.share.size, self.micro_batch_size)

    def steps(self) -> Iterable[int]:
        return itertools.count(self.start_step) if self.stop_step is None else range(self.start_step, self.stop_step)


class LocatedBatches(Protocol):
    """What says of which samples a global batch is: see GlobalBatches."""

    global_batch_size: int

    def locate(self, step: int) -> tuple[np.ndarray, np.ndarray]: ...


class MicroBatches:
    """A batch sampler: one reader's micro batches. Raises InputError when they do not fill the global batches."""

    def __init__(self, batches: LocatedBatches, plan: ReadingPlan):
        self.batches, self.plan, self.micro_steps = batches, plan, plan.micro_steps

    def __iter__(self) -> Iterator[list[SampleAddress]]:
        plan = self.plan
        for step in plan.steps():
            epochs, samples = self.batches.locate(step)
            first = step * self.batches.global_batch_size
            addresses = np.stack([first + np.arange(len(samples)), epochs, samples], axis=1)
            for micro_index in range(self.micro_steps):
                part = rank_slice(addresses, plan.share, plan.micro_batch_size, micro_index)
                yield [SampleAddress(*row) for row in part.tolist()]
