"""The tars of several sources as one set, in which a tar is called SOURCE/TAR."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gigatok_ds.config.sources import Locations, sources_of
from gigatok_ds.data.mixture import Mixture
from gigatok_ds.errors import InputError
from gigatok_ds.shards.contents import Contents, TarShard
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.sample_table import SampleRow, Samples
from gigatok_ds.shards.shard_files import ShardFiles


@dataclass(frozen=True)
class JoinedFiles:
    """As ShardFiles: those of each source, by its name."""

    parts: dict[str, ShardFiles]

    @property
    def location(self) -> str:
        return " and ".join(files.location for files in self.parts.values())

    @property
    def advice(self) -> str:
        return "copy it again, or index its directory again"

    @property
    def transient(self) -> bool:
        return any(files.transient for files in self.parts.values())

    def name(self, tar: str) -> str:
        source, _, name = tar.partition("/")
        return self.parts[source].name(name)

    def held(self, tar: str, expected: TarShard | None = None) -> AbstractContextManager[Path]:
        source, _, name = tar.partition("/")
        return self.parts[source].held(name, expected and replace(expected, name=name))


class JoinedTable:
    """As Samples: those of each table, one after the other, and so their tars."""

    def __init__(self, tables: Sequence[Samples]):
        self.tables = tables
        self.counts = np.concatenate([table.counts for table in tables])
        self._rows = np.cumsum([0, *map(len, tables)])
        self._tars = np.cumsum([0, *(len(table.counts) for table in tables)])

    def __len__(self) -> int:
        return int(self._rows[-1])

    def _place(self, i: int) -> tuple[int, int]:
        """The number of a sample's table, and its own there."""
        part = int(np.searchsorted(self._rows, i, side="right")) - 1
        return part, i - int(self._rows[part])

    def row(self, i: int) -> SampleRow:
        part, own = self._place(i)
        row = self.tables[part].row(own)
        return row._replace(tar=row.tar + int(self._tars[part]))

    def key(self, i: int) -> bytes:
        part, own = self._place(i)
        return self.tables[part].key(own)

    def labels(self, rows: slice = slice(None)) -> np.ndarray:
        first, end, _ = rows.indices(len(self))
        return np.concatenate([table.labels(slice(max(first - start, 0), max(end - start, 0)))
                               for table, start in zip(self.tables, self._rows[:-1].tolist(), strict=True)])

    def numbered(self, position: np.ndarray) -> JoinedTable:
        return JoinedTable([table.numbered(position) for table in self.tables])

    def stored(self) -> Mapping[str, np.ndarray]:
        stored = [table.stored() for table in self.tables]
        return {name: np.concatenate([columns[name] for columns in stored]) for name in stored[0]}


def open_sources(value: Locations, opened: Callable[[str], ShardIndex], *,
                 labelled: bool = True) -> tuple[ShardIndex, Mixture | None]:
    """The samples of all places of a setting as `opened` opens each, and in what proportions they are mixed, if they
    are several. labelled: see `join`.
    """
    sources = sources_of(value)
    names, weights = [source.called for source in sources], [source.weight for source in sources]
    indices = [opened(source.location) for source in sources]
    mixture = Mixture(counts=[len(index) for index in indices], weights=weights) if len(sources) > 1 else None
    return join(indices, names, weights, labelled=labelled), mixture


def open_each(value: Locations, opened: Callable[[str], ShardIndex]) -> dict[str, ShardIndex]:
    """The samples of each place of a setting, by its name."""
    return {source.called: opened(source.location) for source in sources_of(value)}


def join(indices: Sequence[ShardIndex], names: Sequence[str], weights: Sequence[float] | None = None, *,
         labelled: bool = True) -> ShardIndex:
    """The samples of all, one index after the other; the only one as it is.

    Where labels matter (`labelled`), classes are those of all, by their names in the order in which they come. Raises
    InputError where only some of those with labels name their classes: numbers would mean different things.
    """
    if len(indices) == 1:
        return indices[0]
    classes = _common_classes(indices, names) if labelled else []
    for index in indices:
        index.number_as(classes, "the mixture")
    shards = [replace(shard, name=f"{name}/{shard.name}") for name, index in zip(names, indices, strict=True)
              for shard in index.shards]
    table = JoinedTable([index.table for index in indices])
    files = JoinedFiles({name: index.tars for name, index in zip(names, indices, strict=True)})
    identity = json.dumps([list(names), [index.identity() for index in indices], list(weights or ())])
    joined = ShardIndex(files, Contents(shards, classes, table), hashlib.sha256(identity.encode()).hexdigest())
    joined.patience = max(index.patience for index in indices)
    return joined


def _common_classes(indices: Sequence[ShardIndex], names: Sequence[str]) -> list[str]:
    labelled = [index for index in indices if index.is_labelled()]
    named = [bool(index.classes) for index in labelled]
    if any(named) and not all(named):
        raise InputError(f"of {', '.join(names)} some name their classes and others number them, so a label may mean "
                         "two things; pack them with names (gigatok-ds make-shards)")
    if not labelled:
        return []
    return list(dict.fromkeys(name for index in indices for name in index.classes))
