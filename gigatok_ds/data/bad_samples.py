"""Samples that cannot be used: counted by tar, told at a bounded rate; too many of them end the run."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from gigatok_ds.errors import InputError
from gigatok_ds.shards.index import ShardIndex

REPORTED_SINGLY = 10  # bad samples with a line each; after these
REPORT_EVERY = 60.0  # seconds, at least, between two lines that sum up
_NAMED = 3  # tars in a summary

logger = logging.getLogger(__name__)


class BadSample(NamedTuple):
    """The number of a sample, and in one line why it cannot be used."""

    sample: int
    reason: str


class BadSamples:
    """What one rank has met in this run. `limit` is the fraction of its readings that may be replaced (None: all).

    The fraction is of what it reads in a run, but at least of `per_epoch` readings, so that it means something from
    the first step on.
    """

    def __init__(self, index: ShardIndex, limit: float | None, per_epoch: float):
        self.index, self.limit, self.per_epoch = index, limit, per_epoch
        self.read = self.replaced = 0
        self.reasons: dict[int, str] = {}
        self._reported_at = -REPORT_EVERY

    def add(self, found: Iterable[BadSample], read: int, replaced: int) -> None:
        """Count what a batch of `read` samples met, `replaced` of which are others. InputError beyond the limit."""
        new = {bad.sample: bad.reason for bad in found if bad.sample not in self.reasons}
        self.reasons |= new
        self.read += read
        self.replaced += replaced
        self._report(list(new.values()))
        if self.limit is not None and self.replaced > self.limit * max(self.read, self.per_epoch):
            raise InputError(f"{self.replaced} of {self.read} samples could not be used, more than "
                             f"data.max_bad_fraction {self.limit:g} allows: {self.summary()}; gigatok-ds check-shards "
                             f"{self.index.location} lists all of them")

    def summary(self) -> str:
        """The tars with most of them, of several sources each source's number, and the last reason."""
        tars = Counter(self.index.place(sample)[0] for sample in self.reasons)
        sources = Counter(tar.partition("/")[0] for tar in tars.elements() if "/" in tar)
        parts = [f"{count} of {source}" for source, count in sources.most_common()]
        parts += [f"{count} in {tar}" for tar, count in tars.most_common(_NAMED)]
        rest = f" and {len(tars) - _NAMED} more shards" if len(tars) > _NAMED else ""
        return f"{', '.join(parts)}{rest} (the last: {next(reversed(self.reasons.values()))})"

    def _report(self, new: list[str]) -> None:
        """Log the latest reasons, which are counted already."""
        known = len(self.reasons)
        for reason in new[: max(REPORTED_SINGLY - (known - len(new)), 0)]:
            logger.warning("%s; its neighbour takes its place", reason)
        if new and known > REPORTED_SINGLY and time.monotonic() >= self._reported_at + REPORT_EVERY:
            self._reported_at = time.monotonic()
            logger.warning("%d samples could not be used so far: %s", len(self.reasons), self.summary())
