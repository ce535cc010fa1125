"""Files that are whole or absent, and their SHA-256."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either whole or absent (or as it was)."""
    with written_aside(path) as file:
        file.write(data)


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end, whole even after a power failure, or is removed.

    Of a process that is killed a hidden file stays, named `path.name` between dots.
    """
    with scratch_beside(path) as scratch, open(scratch, "wb") as file:
        yield file


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """A path to write a file at that becomes `path` at the end, once it is on the disk, or is removed."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    scratch = Path(name)
    try:
        yield scratch
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        scratch.chmod(0o644)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def synced_sha256(path: Path) -> str:
    """The same, of a file that was just written, once it is on the disk."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Put a file, or a directory's own entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
