"""What an index knows of a directory of tars, and the two files that hold it: `index.json` (classes, shards with size
and SHA-256) and `index.npz` (one row per sample, tar by tar: where its data lies in which shard, its label, CRC-32 and
key, in UTF-8). The latter is not compressed, so that the processes of a host share it where it lies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gigatok_ds.errors import InputError
from gigatok_ds.file_kinds import is_tar
from gigatok_ds.files import sha256, write_atomically, written_aside
from gigatok_ds.npy_files import map_npz
from gigatok_ds.plain import from_plain
from gigatok_ds.shards.sample_table import COLUMNS, Samples, SampleTable, parts_of
from gigatok_ds.shards.tar_scan import Entry
from gigatok_ds.untrusted import brief, parse_json

INDEX_FILE = "index.json"
TABLE_FILE = "index.npz"
FORMAT = "gigatok-ds-shards/2"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TarShard:
    """One tar: file name, size in bytes, SHA-256 in hexadecimal, number of samples."""

    name: str
    size: int
    sha256: str
    samples: int


def describe_shard(path: Path, entries: list[Entry]) -> TarShard:
    """Name, size, hash and number of samples of the tar at `path`."""
    return TarShard(name=path.name, size=path.stat().st_size, sha256=sha256(path), samples=len(entries))


class Contents(NamedTuple):
    """What an index knows: the tars, class names (or none), a row per sample, and what `scan_tar` found amiss."""

    shards: list[TarShard]
    classes: list[str]
    table: Samples
    problems: Sequence[str] = ()

    def check_problems(self, max_bad_fraction: float) -> None:
        """Raise InputError, with the first problem, when they are more than that fraction of the samples."""
        if not self.problems:
            return
        more = len(self.problems) - 1
        said = f"{self.problems[0]} (and {more} more problems)" if more else self.problems[0]
        if len(self.problems) > max_bad_fraction * len(self.table):
            raise InputError(said)
        logger.warning("%s; such samples are replaced", said)


def columns_of(entries: Sequence[Entry]) -> dict[str, np.ndarray]:
    """The samples of a tar, as they are kept of many tars: in arrays."""
    columns = {name: np.array([getattr(entry, name) for entry in entries], kind) for name, kind in COLUMNS.items()}
    return columns | {"key": np.array([entry.key.encode() for entry in entries], np.bytes_)}


def build_table(shards: Sequence[TarShard], groups: Sequence[Mapping[str, np.ndarray]]) -> SampleTable:
    """The rows of all tars, from `columns_of` each. InputError when there are none or a key repeats."""
    if not sum(shard.samples for shard in shards):
        raise InputError("there are no samples in any shard")
    table = SampleTable({name: np.concatenate([group[name] for group in groups]) for name in groups[0]},
                        [shard.samples for shard in shards])
    keys = table.columns["key"]
    order = np.argsort(keys, kind="stable")
    again = order[1:][keys[order[1:]] == keys[order[:-1]]]
    if len(again):
        second = int(again.min())
        first = int(np.flatnonzero(keys == keys[second])[0])
        names = f"{shards[table.row(first).tar].name} and {shards[table.row(second).tar].name}"
        raise InputError(f"sample {table.key(second).decode()!r} occurs in both {names}; keys must be unique")
    return table


def write_index(directory: Path, contents: Contents) -> None:
    """Write both sidecars: `index.json` comes last and holds the hash of `index.npz` (no mixed pairs)."""
    shards, classes, table, problems = contents
    numbers = np.arange(len(shards), dtype=np.min_scalar_type(len(shards)))
    columns: dict[str, Any] = {"shard": np.repeat(numbers, table.counts), **table.stored()}
    with written_aside(directory / TABLE_FILE) as file:
        np.savez(file, **{name: columns[name] for name in sorted(columns)})
    description = {"format": FORMAT, "classes": classes, "count": len(table),
                   "table_sha256": sha256(directory / TABLE_FILE), "problems": list(problems),
                   "shards": [dataclasses.asdict(shard) for shard in shards]}
    write_atomically(directory / INDEX_FILE, (json.dumps(description, indent=1) + "\n").encode())


def load_index(directory: Path) -> Contents:
    """What both sidecars say.

    Nothing in them may lead outside the directory or its shards: then, or when they are damaged, InputError says why.
    """
    try:
        description = parse_json((directory / INDEX_FILE).read_bytes(), INDEX_FILE)
        if description["format"] != FORMAT:
            raise InputError(f"its format is {description['format']!r}, this version reads {FORMAT!r}")
        shards = from_plain(list[TarShard], description["shards"], "shards")
        classes, problems = ([str(text) for text in description[name]] for name in ("classes", "problems"))
        with open(directory / TABLE_FILE, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != description["table_sha256"]:
                raise InputError(f"{TABLE_FILE} does not belong to {INDEX_FILE}")
            arrays = map_npz(file)
        table = _checked_table(arrays, description["count"], shards, directory / TABLE_FILE)
    except FileNotFoundError as error:
        raise InputError(str(error)) from None
    except Exception as error:
        raise InputError(brief(error)) from None
    return Contents(shards, classes, table, problems)


def _checked_table(arrays: Mapping[str, np.ndarray], count: int, shards: list[TarShard], path: Path) -> SampleTable:
    for shard in shards:
        if shard.name != os.path.basename(shard.name) or not is_tar(shard.name):
            raise InputError(f"shard name {shard.name!r} leads outside the directory")
    columns = {name: arrays[name] for name in (*COLUMNS, "key")}
    for name, kind in {**COLUMNS, "shard": np.int64}.items():
        if not np.can_cast(arrays[name].dtype, kind, "safe"):
            raise InputError(f"its column {name} has type {arrays[name].dtype}")
    if columns["key"].dtype.kind != "S":
        raise InputError(f"its column key has type {columns['key'].dtype}")
    samples = [shard.samples for shard in shards]
    if {column.shape for column in (*columns.values(), arrays["shard"])} != {(count,)} or count != sum(samples):
        raise InputError("the numbers of samples disagree")
    if not count or min(samples) < 0:
        raise InputError("a sample lies in no shard")
    table = SampleTable(columns, samples, source=path)
    for rows in parts_of(count):
        _check_places({name: column[rows] for name, column in arrays.items()}, table.tars(rows), shards)
    return table


def _check_places(part: Mapping[str, np.ndarray], tars: np.ndarray, shards: list[TarShard]) -> None:
    if (part["shard"] != tars).any():
        raise InputError("the samples are not in the order of their shards")
    offset, size = (part[name].astype(np.int64) for name in ("offset", "size"))
    if offset.min() < 0 or size.min() < 0:
        raise InputError("a sample lies in no shard")
    if (size > np.array([shard.size for shard in shards])[tars] - offset).any():
        raise InputError("a sample lies beyond the end of its shard")
