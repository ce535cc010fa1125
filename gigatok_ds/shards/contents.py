"""What an index knows of a directory of tars, and the two files that hold it: `index.json` (classes, shards with size
and SHA-256) and `index.npz` (one row per sample: where its data lies in which shard, its label, CRC-32 and key, in
UTF-8).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gigatok_ds.errors import InputError
from gigatok_ds.files import sha256, write_atomically
from gigatok_ds.npy_files import read_npz
from gigatok_ds.plain import from_plain
from gigatok_ds.shards.tar_members import is_tar
from gigatok_ds.shards.tar_scan import Entry
from gigatok_ds.untrusted import brief, parse_json

INDEX_FILE = "index.json"
TABLE_FILE = "index.npz"
FORMAT = "gigatok-ds-shards/2"

_TABLE_TYPES = {"shard": np.int32, "offset": np.int64, "size": np.int64, "label": np.int32,
                "crc32": np.uint32}

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
    table: dict[str, np.ndarray]
    problems: Sequence[str] = ()

    def check_problems(self, max_bad_fraction: float) -> None:
        """Raise InputError, with the first problem, when they are more than that fraction of the samples."""
        if not self.problems:
            return
        more = len(self.problems) - 1
        told = f"{self.problems[0]} (and {more} more problems)" if more else self.problems[0]
        if len(self.problems) > max_bad_fraction * len(self.table["label"]):
            raise InputError(told)
        logger.warning("%s; such samples are replaced", told)


def build_table(shards: list[TarShard], entries: list[list[Entry]]) -> dict[str, np.ndarray]:
    """The per-sample arrays of `entries[shard number]`. InputError when there are none or a key repeats."""
    rows = [(number, entry) for number, group in enumerate(entries) for entry in group]
    if not rows:
        raise InputError("there are no samples in any shard")
    first: dict[str, int] = {}
    for number, entry in rows:
        if first.setdefault(entry.key, number) != number:
            names = f"{shards[first[entry.key]].name} and {shards[number].name}"
            raise InputError(f"sample {entry.key!r} occurs in both {names}; keys must be unique")
    table = {name: np.array([getattr(entry, name) for _, entry in rows], kind)
             for name, kind in _TABLE_TYPES.items() if name != "shard"}
    return table | {"shard": np.array([number for number, _ in rows], _TABLE_TYPES["shard"]),
                    "key": np.array([entry.key.encode() for _, entry in rows])}


def write_index(directory: Path, contents: Contents) -> None:
    """Write both sidecars: `index.json` comes last and holds the hash of `index.npz` (no mixed pairs)."""
    shards, classes, table, problems = contents
    buffer = io.BytesIO()
    columns: dict[str, Any] = {name: table[name] for name in sorted(table)}
    np.savez_compressed(buffer, **columns)
    data = buffer.getvalue()
    description = {"format": FORMAT, "classes": classes, "count": len(table["label"]),
                   "table_sha256": hashlib.sha256(data).hexdigest(), "problems": list(problems),
                   "shards": [dataclasses.asdict(shard) for shard in shards]}
    write_atomically(directory / TABLE_FILE, data)
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
        data = (directory / TABLE_FILE).read_bytes()
        if hashlib.sha256(data).hexdigest() != description["table_sha256"]:
            raise InputError(f"{TABLE_FILE} does not belong to {INDEX_FILE}")
        arrays = read_npz(data, name=TABLE_FILE)
        table = {name: arrays[name].astype(kind, casting="safe") for name, kind in _TABLE_TYPES.items()}
        table["key"] = arrays["key"].astype(np.bytes_, casting="safe", copy=False)
        _check_table(description["count"], shards, table)
    except FileNotFoundError as error:
        raise InputError(str(error)) from None
    except Exception as error:
        raise InputError(brief(error)) from None
    return Contents(shards, classes, table, problems)


def _check_table(count: int, shards: list[TarShard], table: dict[str, np.ndarray]) -> None:
    for shard in shards:
        if shard.name != os.path.basename(shard.name) or not is_tar(shard.name):
            raise InputError(f"shard name {shard.name!r} leads outside the directory")
    stored = sum(shard.samples for shard in shards)
    if {len(column) for column in table.values()} != {count} or count != stored:
        raise InputError("the numbers of samples disagree")
    number, offset, size = table["shard"], table["offset"], table["size"]
    if count == 0 or number.min() < 0 or number.max() >= len(shards) or offset.min() < 0 or size.min() < 0:
        raise InputError("a sample lies in no shard")
    if (size > np.array([shard.size for shard in shards])[number] - offset).any():
        raise InputError("a sample lies beyond the end of its shard")
