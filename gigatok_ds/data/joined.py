"""The tars of several sources as one set, in which a tar is called SOURCE/TAR."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gigatok_ds.config.sources import Locations, sources_of
from gigatok_ds.data.mixture import Mixture
from gigatok_ds.errors import InputError
from gigatok_ds.shards.contents import Contents, TarShard
from gigatok_ds.shards.index import ShardIndex
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
    starts = np.cumsum([0, *(len(index.shards) for index in indices)])
    shards = [replace(shard, name=f"{name}/{shard.name}") for name, index in zip(names, indices, strict=True)
              for shard in index.shards]
    tables = [index.table | {"label": index.labels} for index in indices]
    table = {column: np.concatenate([table[column] for table in tables]) for column in tables[0]}
    table["shard"] = np.concatenate([index.shard_numbers + start for index, start
                                     in zip(indices, starts, strict=False)]).astype(np.int32)
    files = JoinedFiles({name: index.tars for name, index in zip(names, indices, strict=True)})
    identity = json.dumps([list(names), [index.identity() for index in indices], list(weights or ())])
    joined = ShardIndex(files, Contents(shards, classes, table), hashlib.sha256(identity.encode()).hexdigest())
    joined.patience = max(index.patience for index in indices)
    return joined


def _common_classes(indices: Sequence[ShardIndex], names: Sequence[str]) -> list[str]:
    labelled = [bool((index.labels >= 0).any()) for index in indices]
    named = [bool(index.classes) for index in indices if (index.labels >= 0).any()]
    if any(named) and not all(named):
        raise InputError(f"of {', '.join(names)} some name their classes and others number them, so a label may mean "
                         "two things; pack them with names (gigatok-ds make-shards)")
    if not any(labelled):
        return []
    return list(dict.fromkeys(name for index in indices for name in index.classes))
