"""Files and directories that are whole or absent, and SHA-256."""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from gigatok_ds.errors import InputError
from gigatok_ds.signals import signals_wait, undone_by_signals

_TOKEN = 8  # bytes of a hidden name that make it unlike all others
_REPLACED = ".replaced"  # ends the name of what is being replaced, where two names cannot be exchanged


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either whole or absent (or as it was)."""
    with written_aside(path) as file:
        file.write(data)


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end, whole even after a power failure, or is removed.

    SIGTERM and SIGHUP undo it as Ctrl-C does. Of a process that is killed a hidden file stays, named `path.name`
    between dots.
    """
    with scratch_beside(path) as scratch, open(scratch, "wb") as file:
        yield file


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """A path to write a file at that becomes `path` at the end, once it is on the disk, or is removed.

    It has the permissions that the umask gives to new files.
    """
    def make(name: Path) -> None:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))

    with undone_by_signals(), _hidden(path, make, remove=lambda name: name.unlink(missing_ok=True)) as scratch:
        yield scratch
        sync(scratch)
        os.replace(scratch, path)


@contextmanager
def directory_beside(path: Path, *, replaceable: Callable[[Path], object] | None = None) -> Iterator[Path]:
    """A hidden directory to write into that becomes `path` at the end, at once, or is removed.

    What `path` is before must be an empty directory, or one at which `replaceable` raises nothing: that is there until
    the new one is, and is deleted then. SIGTERM and SIGHUP undo it as Ctrl-C does; of a process that is killed a hidden
    directory stays. The permissions are those that the umask gives.
    """
    # what is removed at the end is what was not finished, or what was replaced
    with undone_by_signals(), _hidden(path, os.mkdir, remove=partial(shutil.rmtree, ignore_errors=True)) as scratch:
        yield scratch
        if replaceable and path.exists():
            replaceable(path)
            _take_the_place(scratch, path)
        else:
            os.rename(scratch, path)
        sync(path.parent)


@contextmanager
def _hidden(path: Path, make: Callable[[Path], object], remove: Callable[[Path], object]) -> Iterator[Path]:
    """A new name beside `path`, at which `make` has made something; `remove` takes away what has it at the end.

    A signal that arrives while it is made or removed waits. One that arrives as removing begins has removing begin
    again.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(_TOKEN)}")
    try:
        try:
            with signals_wait():
                make(scratch)
            yield scratch
        finally:
            with signals_wait():
                remove(scratch)
    finally:
        with signals_wait():
            remove(scratch)


def is_scratch_of(path: Path, name: str) -> bool:
    """Whether a name beside `path` is one that a process that was killed has left."""
    return re.fullmatch(re.escape(f".{path.name}.") + f"[0-9a-f]{{{2 * _TOKEN}}}", name) is not None


def _take_the_place(new: Path, old: Path) -> None:
    """Give `new` the name of the directory `old`, which gets that of `new`.

    Where the file system cannot exchange two names there is a moment in which nothing has the name; see `put_back`.
    """
    if _exchanged(new, old):
        return
    aside = new.with_name(new.name + _REPLACED)
    with signals_wait():
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except OSError:
            put_back(old)
            raise
        os.rename(aside, new)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two names could be exchanged at once: renameat2 of Linux, which some file systems do not have."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def put_back(path: Path) -> None:
    """Give a directory its name again that had lost it when a process was killed while it was being replaced."""
    if os.path.lexists(path):
        return
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*{_REPLACED}"):
        os.rename(aside, path)
        return


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
def naming_failures(path: Path) -> Iterator[None]:
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
