"""Writing directories of WebDataset tars: equal samples give equal bytes, and a failure leaves nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gigatok_ds.errors import InputError
from gigatok_ds.files import directory_beside
from gigatok_ds.shards.contents import Contents, TarShard, build_table, columns_of, describe_shard, write_index
from gigatok_ds.shards.tar_scan import is_key, is_safe_key, scan_tar

_TAR_OPTIONS = {"user": "gigatok", "group": "gigatok", "mtime": 0, "encoder": False}

Record = tuple[str, dict[str, bytes]]  # a key and its members by extension


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """What was written: the directory, its tars, and the number of samples in all."""

    directory: Path
    shards: list[TarShard]
    count: int


def unused(out_dir: str | Path) -> Path:
    """`out_dir`, resolved. InputError when it exists and is not an empty directory."""
    out_dir = Path(out_dir).resolve()
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise InputError(f"output directory {out_dir} exists and is not empty; choose another or remove it")
    return out_dir


@contextmanager
def new_directory(out_dir: str | Path) -> Iterator[Path]:
    """A hidden sibling of `out_dir` to write into: it becomes `out_dir` at the end, or is removed.

    Raises InputError when `out_dir` exists and is not an empty directory, which stays as it is.
    """
    out_dir = unused(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with directory_beside(out_dir) as scratch:
        yield scratch


def write_tars(records: Iterable[Record], directory: Path, *, prefix: str, samples_per_shard: int,
               extensions: tuple[str, ...], classes: list[str]) -> list[TarShard]:
    """Write records as `prefix-000000.tar`, ... with their index into `directory` and return the shards.

    Each tar is read back once to be indexed, so the index describes what is on the disk. Raises InputError
    when a key leads outside or is repeated, and when there are no records.
    """
    if not is_safe_key(prefix):
        raise InputError(f"shard prefix {prefix!r} may hold only letters, digits and _ + = @ -")
    if samples_per_shard < 1:
        raise InputError(f"samples per shard is {samples_per_shard}; it must be at least 1")
    records = iter(records)
    seen: set[str] = set()
    shards: list[TarShard] = []
    columns: list[dict[str, np.ndarray]] = []
    for first in records:
        path = directory / f"{prefix}-{len(shards):06d}.tar"
        with open(path, "xb") as file:
            write_tar(itertools.chain([first], itertools.islice(records, samples_per_shard - 1)), file, seen)
        entries = scan_tar(path, extensions)
        columns.append(columns_of(entries))
        shards.append(describe_shard(path, entries))
    if not shards:
        raise InputError("there are no samples to write")
    write_index(directory, Contents(shards, classes, build_table(shards, columns)))
    return shards


def write_tar(records: Iterable[Record], file: BinaryIO, seen: set[str]) -> None:
    """Write records as one tar into an open file and add their keys to `seen`.

    Raises InputError when a key leads outside or is in `seen` already.
    """
    from webdataset import TarWriter

    with TarWriter(file, **_TAR_OPTIONS) as tar:
        for key, members in records:
            _check_key(key, seen)
            tar.write({"__key__": key, **members})


def _check_key(key: str, seen: set[str]) -> None:
    if not is_key(key):
        raise InputError(f"sample key {key!r} is not the name of a file without a dot, below its directory")
    if key in seen:
        raise InputError(f"sample key {key!r} occurs twice; keys must be unique")
    seen.add(key)
