"""Files and directories that are whole or absent, and SHA-256."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gigatok_ds.errors import InputError


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


@contextmanager
def directory_beside(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A hidden directory to write into that becomes `path` at the end, or is removed.

    What `path` is before must be an empty directory, or anything with `replace`.
    """
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    replaced = scratch.with_name(scratch.name + ".replaced")
    try:
        yield scratch
        scratch.chmod(0o755)
        if replace and path.exists():
            os.rename(path, replaced)
        os.rename(scratch, path)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        if replaced.exists() and not path.exists():
            os.rename(replaced, path)
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_failure(error: BaseException) -> str | None:
    """Why something could not be written, if that is what an exception says; None for any other.

    torch hides errors of the operating system in a RuntimeError, and safetensors in an exception of its own.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text):
        return "writing failed, probably for lack of space"
    return text if "I/O error" in text else None


@contextmanager
def told_failures(path: Path) -> Iterator[None]:
    """Within, what keeps `path` from being written becomes an InputError of one line."""
    try:
        yield
    except Exception as error:
        reason = write_failure(error)
        if reason is None:
            raise
        raise InputError(f"{path} could not be written ({reason}); make room or choose another place") from error


def sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def synced_sha256(path: Path) -> str:
    """The same, of a file that was just written, once it is on the disk."""
    sync(path)
    return sha256(path)


def sync(path: Path) -> None:
    """Put a file, or a directory's own entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
