"""The least that a step can take: every tensor that must cross memory crosses it once.

Matrix products, convolutions, attention and the quantizer read their inputs and write their results, each at its stated
rates. All that is between two of them is taken for one perfect kernel, of all operations that need equally many
products before them: it reads each tensor from outside once, and writes once what is read outside of it. What the
backward pass needs of such a kernel's inside is either written and read, or made again from what the kernel read,
whichever moves less. Nothing takes time to start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gigatok_ds.dry_run.work import Operation, Rates


class FloorPart(NamedTuple):
    """The part of a storage that a tensor sees: where it begins, and how many elements it has."""

    storage: int
    offset: int
    elements: int


Tensors = Sequence[tuple[FloorPart, int]]  # with their bytes


class _Region(NamedTuple):
    """The operations between products: how many products lie before them, and in which pass."""

    level: int
    backward: bool


class Floor:
    """Fed by a meter, operation by operation, in the order in which they run."""

    def __init__(self):
        self.products: list[Operation] = []
        self._moved: dict[_Region, int] = {}
        self._has_read: set[tuple[_Region, FloorPart]] = set()
        self._written: set[FloorPart] = set()
        # Of each storage: products before it; the region that makes it (none: a product does); what that reads for it.
        self._level: dict[int, int] = {}
        self._region: dict[int, _Region] = {}
        self._roots: dict[int, dict[FloorPart, int]] = {}

    def note(self, operation: Operation, read: Tensors, written: Tensors, *, opaque: bool, backward: bool) -> None:
        """opaque: a product, which nothing is merged with."""
        level = max((self._level.get(part.storage, 0) for part, _ in read), default=0)
        if opaque:
            for part, size in read:
                self._write(part, size)
            self.products.append(operation)
            for part, _ in written:
                self._level[part.storage] = level + 1
                self._region.pop(part.storage, None)
            return
        region = _Region(level, backward)
        roots: dict[FloorPart, int] = {}
        for part, size in read:
            roots |= self._reached(region, part, size)
        for part, _ in written:
            self._level[part.storage], self._region[part.storage], self._roots[part.storage] = level, region, roots
            self._written.discard(part)

    def _write(self, part: FloorPart, size: int) -> None:
        """The region that makes it must write it, once."""
        region = self._region.get(part.storage)
        if region is not None and part not in self._written:
            self._written.add(part)
            self._move(region, size)

    def _reached(self, region: _Region, part: FloorPart, size: int) -> dict[FloorPart, int]:
        """What is read for a tensor within `region`, with its bytes."""
        made_in = self._region.get(part.storage)
        if made_in == region:
            return self._roots[part.storage]
        if made_in is not None and part not in self._written:
            again = self._roots[part.storage]
            if sum(more for root, more in again.items() if (region, root) not in self._has_read) <= 2 * size:
                for root, more in again.items():
                    self._read(region, root, more)
                return again
            self._write(part, size)
        self._read(region, part, size)
        return {part: size}

    def _read(self, region: _Region, part: FloorPart, size: int) -> None:
        if (region, part) not in self._has_read:
            self._has_read.add((region, part))
            self._move(region, size)

    def _move(self, region: _Region, size: int) -> None:
        self._moved[region] = self._moved.get(region, 0) + size

    @property
    def bytes_between(self) -> int:
        """That all regions between products move."""
        return sum(self._moved.values())

    def seconds(self, rates: Rates) -> float:
        return sum(map(rates.crossing, self.products)) + self.bytes_between / rates.bandwidth
