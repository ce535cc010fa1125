"""Finding the samples of a WebDataset tar."""

from __future__ import annotations

import re
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gigatok_ds.errors import InputError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
NO_LABEL = -1

_BLOCK = 512  # of the tar format
_UNSAFE = re.compile(r"[^\w+=@-]")  # a key ends at the first dot, and must be usable as a file name


class Entry(NamedTuple):
    """One sample of a tar: `size` bytes of image or codes at byte `offset`."""

    key: str
    offset: int
    size: int
    label: int
    crc32: int


def safe_key(text: str) -> str:
    """`text` with everything that a key may not hold (slashes, dots, spaces, ...) replaced by underscores."""
    return _UNSAFE.sub("_", text)


def is_safe_key(key: str) -> bool:
    """Whether `key` is not empty and holds only letters, digits and _ + = @ -."""
    return bool(key) and not _UNSAFE.search(key)


def scan_tar(path: Path, extensions: tuple[str, ...] = IMAGE_EXTENSIONS,
             problems: list[str] | None = None) -> list[Entry]:
    """The samples of a WebDataset tar, in its order: members KEY.cls and KEY.x with one x of `extensions`.

    Directories in a member's name become part of the key; other members are ignored. Raises InputError,
    naming shard and sample, when the tar is compressed, cut off or damaged, holds links or names that lead
    outside, or when a sample lacks its data or its label, has one of them twice, or its label is not an
    integer.

    With a list of `problems` those of samples that lack their data (then they have no bytes) or their label (NO_LABEL)
    are added to it instead.
    """
    scan = _Scan(path, extensions, problems)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                scan.add(tar, member)
        with open(path, "rb") as file:
            check_end(file, scan.end, str(path))
    except tarfile.TarError as error:
        raise InputError(f"{path} is not a whole uncompressed tar ({error}); write it again") from None
    return scan.entries()


class _Scan:
    def __init__(self, path: Path, extensions: tuple[str, ...], problems: list[str] | None):
        self.path, self.extensions, self.problems = path, extensions, problems
        self.payloads: dict[str, tuple[int, int, int]] = {}
        self.labels: dict[str, int] = {}
        self.end = 0

    def report(self, problem: str) -> None:
        if self.problems is None:
            raise InputError(problem)
        self.problems.append(problem)

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self.end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        key, extension = _split_name(self.path, member.name)
        if member.isdir() or not key or extension not in (*self.extensions, "cls"):
            return
        if not member.isreg() or member.issparse():
            raise InputError(f"{self.path}: {member.name!r} is not a plain file; links are not followed")
        if key in (self.labels if extension == "cls" else self.payloads):
            raise InputError(f"{self.path}: sample {key!r} occurs twice; keys must be unique")
        data = tar.extractfile(member).read()
        if extension == "cls":
            self.labels[key] = self.parse_label(key, data)
        else:
            self.payloads[key] = (member.offset_data, member.size, zlib.crc32(data))

    def parse_label(self, key: str, data: bytes) -> int:
        if re.fullmatch(rb"-?[0-9]{1,9}", data.strip()):
            return int(data)
        self.report(f"{self.path}: label of sample {key!r} is {data[:40]!r}; it must be a class number, such as 207")
        return NO_LABEL

    def entries(self) -> list[Entry]:
        for key in sorted(self.labels.keys() ^ self.payloads.keys()):
            lacking = "label (KEY.cls)" if key in self.payloads else f"data (KEY.{' or KEY.'.join(self.extensions)})"
            self.report(f"{self.path}: sample {key!r} has no {lacking}")
        found = self.payloads | {key: (0, 0, 0) for key in self.labels if key not in self.payloads}
        return [Entry(key, offset, size, self.labels.get(key, NO_LABEL), crc32)
                for key, (offset, size, crc32) in found.items()]


def _split_name(path: Path, name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member: its name is cut at the first dot of its last part."""
    *folders, base = name.split("/")
    if name.startswith("/") or ".." in (*folders, base):
        raise InputError(f"{path}: member name {name!r} leads outside its directory; such tars are refused")
    stem, _, extension = base.partition(".")
    parts = [part for part in folders if part not in ("", ".")]
    return stem and safe_key("/".join([*parts, stem])), extension.lower()


def check_end(tar: BinaryIO, end: int, name: str) -> None:
    """InputError, naming the tar, unless it ends where its last member does.

    tarfile takes a damaged header after the first member for the end of the archive, without a word.
    """
    tar.seek(end)
    if tar.read(_BLOCK) != bytes(_BLOCK):
        raise InputError(f"{name} is cut off or damaged at byte {end}; copy or write it again")
