"""What an index says of a tar as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gigatok_ds.files import sha256
from gigatok_ds.shards.tar_scan import Entry


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
