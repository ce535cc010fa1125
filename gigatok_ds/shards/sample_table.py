"""A row for each sample of a set of tars: of a hundred million, memory holds one copy for all processes of a host."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from gigatok_ds.npy_files import map_npz
from gigatok_ds.shards.class_labels import renumbered
from gigatok_ds.untrusted import reading

# The widest type of each column; the smallest that holds its values is stored.
COLUMNS = {"offset": np.int64, "size": np.int64, "label": np.int32, "crc32": np.uint32}
ROWS_AT_ONCE = 2**20  # looked through at a time


class SampleRow(NamedTuple):
    """Where the data of a sample is: `size` bytes at byte `offset` of tar number `tar`; its label and CRC-32."""

    tar: int
    offset: int
    size: int
    label: int
    crc32: int


class Samples(Protocol):
    """What is known of N samples, numbered from 0, tar by tar: `counts` (M,) says how many each tar has."""

    counts: np.ndarray

    def __len__(self) -> int: ...

    def row(self, i: int) -> SampleRow: ...

    def key(self, i: int) -> bytes: ...

    def labels(self, rows: slice = ...) -> np.ndarray:
        """Class numbers, int32."""

    def numbered(self, position: np.ndarray) -> Samples:
        """The same samples with labels `position[label]`, of those that it has (C,)."""

    def stored(self) -> Mapping[str, np.ndarray]:
        """The columns offset, size, label, crc32 and key, each (N,)."""


class SampleTable:
    """See Samples. Columns that are mapped from a file, `source`, are mapped again where the table is unpickled."""

    def __init__(self, columns: Mapping[str, np.ndarray], counts: Sequence[int], source: Path | None = None):
        self.columns = {name: column if source else _narrow(column) for name, column in columns.items()}
        self.counts, self._source = np.asarray(counts), source
        self._ends = np.cumsum(self.counts)
        self._position: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.columns["label"])

    def row(self, i: int) -> SampleRow:
        offset, size, label, crc32 = (int(self.columns[name][i]) for name in COLUMNS)
        if self._position is not None and 0 <= label < len(self._position):
            label = int(self._position[label])
        return SampleRow(self.tar(i), offset, size, label, crc32)

    def tar(self, i: int) -> int:
        return int(np.searchsorted(self._ends, i, side="right"))

    def key(self, i: int) -> bytes:
        return bytes(self.columns["key"][i])

    def labels(self, rows: slice = slice(None)) -> np.ndarray:
        labels = self.columns["label"][rows].astype(np.int32, copy=False)
        return renumbered(labels, self._position)

    def numbered(self, position: np.ndarray) -> SampleTable:
        other = copy.copy(self)
        other._position = position if self._position is None else renumbered(self._position, position)
        return other

    def stored(self) -> Mapping[str, np.ndarray]:
        return self.columns

    def tars(self, rows: slice) -> np.ndarray:
        """The numbers of these samples' tars."""
        return np.searchsorted(self._ends, np.arange(*rows.indices(len(self))), side="right")

    def __getstate__(self) -> dict:
        return self.__dict__ | ({"columns": None} if self._source else {})

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self._source:
            with reading(self._source), open(self._source, "rb") as file:
                arrays = map_npz(file)
                self.columns = {name: arrays[name] for name in (*COLUMNS, "key")}
                if {len(column) for column in self.columns.values()} != {int(self.counts.sum())}:
                    raise ValueError("it was replaced while it was used")


def parts_of(count: int) -> Iterator[slice]:
    """So many rows, cut into pieces that temporary arrays can be made of."""
    return (slice(start, min(start + ROWS_AT_ONCE, count)) for start in range(0, count, ROWS_AT_ONCE))


def _narrow(column: np.ndarray) -> np.ndarray:
    """The column in four bytes, where these hold its values."""
    fits = column.dtype == np.int64 and len(column) and column.min() >= 0 and column.max() < 2**32
    return column.astype(np.uint32) if fits else column
