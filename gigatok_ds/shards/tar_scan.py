"""Finding the samples of a WebDataset tar."""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gigatok_ds.errors import InputError
from gigatok_ds.shards.class_labels import StoredLabels
from gigatok_ds.shards.tar_members import FILE, Member, tar_members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
NO_LABEL = -1
CAPTION = "txt"
# What a tally of members counts beside those left out, by reason.
SAMPLES, LABELS, CAPTIONS = "samples", "labels of samples", "captions"
DOTTED = "images with two dots in their names (a key ends at the first)"

_UNSAFE = re.compile(r"[^\w+=@-]")


class Entry(NamedTuple):
    """One sample of a tar: `size` bytes of image or codes at byte `offset`."""

    key: str
    offset: int
    size: int
    label: int
    crc32: int


def safe_key(text: str) -> str:
    """`text` with everything that may trouble a file name (slashes, dots, spaces, ...) replaced by underscores."""
    return _UNSAFE.sub("_", text)


def is_safe_key(key: str) -> bool:
    """Whether `key` is not empty and holds only letters, digits and _ + = @ -."""
    return bool(key) and not _UNSAFE.search(key)


def is_key(key: str) -> bool:
    """Whether `key` may be one: a relative path that does not lead out, without a dot in its last part."""
    *folders, base = key.split("/")
    return bool(base) and "." not in base and "\0" not in key and not {"", ".", ".."} & set(folders)


def scan_tar(path: Path, extensions: tuple[str, ...] = IMAGE_EXTENSIONS, problems: list[str] | None = None,
             tally: Counter | None = None, labels: StoredLabels | None = None) -> list[Entry]:
    """The samples of a WebDataset tar, in its order: members KEY.x with one x of `extensions` and, if any, KEY.cls.

    A sample without KEY.cls has NO_LABEL, which matters where labels are needed only. Labels are numbers or, with
    `labels`, what these say. A key is a member's name, directories and all, up to the first dot of its last part.
    Raises InputError, naming shard and sample, when the tar is compressed, cut off or damaged, holds links out of it or
    names that lead outside, or when a sample lacks its data, has that or its label twice, its data is empty, or its
    label is none.

    With a list of `problems` those of samples that lack their data (then they have no bytes) or whose label is none
    (NO_LABEL) are added to it instead. Every member is counted in `tally`: as the data of a sample, its label, or by
    the reason why it is left out.
    """
    scan = _Scan(path, extensions, problems, Counter() if tally is None else tally, labels)
    with open(path, "rb") as file:
        for member in tar_members(path):
            scan.add(file, member)
    return scan.entries()


def members_by_key(path: Path, extension: str) -> dict[str, tuple[int, int]]:
    """Byte offset and size of each member KEY.extension of a tar, by its key. Raises what `tar_members` raises."""
    places = {}
    for member in tar_members(path):
        key, found = _split_name(path, member.name)
        if key and found == extension and member.kind == FILE:
            places[key] = member.offset, member.size
    return places


def stored_labels(path: Path, labels: StoredLabels | None = None) -> Iterator[tuple[str, int]]:
    """(key, label) of each member KEY.cls of a tar, in its order, without reading the rest. Raises what `scan_tar`
    raises.
    """
    scan = _Scan(path, (), [], Counter(), labels)
    with open(path, "rb") as file:
        for member in tar_members(path):
            key, extension = _split_name(path, member.name)
            if key and extension == "cls" and member.kind == FILE:
                yield key, scan.parse_label(key, _read(file, member))


class _Scan:
    def __init__(self, path: Path, extensions: tuple[str, ...], problems: list[str] | None, tally: Counter,
                 stored: StoredLabels | None):
        self.path, self.extensions, self.problems, self.tally, self.stored = path, extensions, problems, tally, stored
        self.payloads: dict[str, tuple[int, int, int]] = {}
        self.labels: dict[str, int] = {}
        self.empty: set[str] = set()

    def report(self, problem: str) -> None:
        if self.problems is None:
            raise InputError(problem)
        self.problems.append(problem)

    def add(self, file: BinaryIO, member: Member) -> None:
        key, extension = _split_name(self.path, member.name)
        if key and extension == CAPTION and member.kind == FILE:
            self.tally[CAPTIONS] += 1
        elif not key or extension not in (*self.extensions, "cls"):
            self.tally[self.why_not(member, key, extension)] += 1
        elif member.kind == "directories":
            self.tally[member.kind] += 1
        elif member.kind != FILE:
            raise InputError(
                f"{self.path}: {member.name!r} is not a plain file, nor a link to one before it; other links "
                "are not followed"
            )
        elif key in self.labels if extension == "cls" else key in self.payloads or key in self.empty:
            raise InputError(f"{self.path}: sample {key!r} occurs twice; keys must be unique")
        elif extension == "cls":
            self.labels[key] = self.parse_label(key, _read(file, member))
            self.tally[LABELS] += 1
        elif not member.size:
            self.empty.add(key)
            self.tally["empty files"] += 1
        else:
            self.payloads[key] = (member.offset, member.size, zlib.crc32(_read(file, member)))
            self.tally[SAMPLES] += 1

    def why_not(self, member: Member, key: str, extension: str) -> str:
        """The reason why a member is neither data nor label."""
        if member.kind != FILE:
            return member.kind
        if not key:
            return "hidden files"
        if extension.rpartition(".")[2] in self.extensions:  # WebDataset's rule makes it another member of a sample
            return DOTTED
        return f".{extension.rpartition('.')[2]} files" if extension else "files without extension"

    def parse_label(self, key: str, data: bytes) -> int:
        number = int(data) if re.fullmatch(rb"-?[0-9]{1,9}", data.strip()) else None
        if self.stored is not None:
            number = self.stored.number(data)
        if number is None:
            self.report(no_number(self.path, key, data))
        return NO_LABEL if number is None else number

    def entries(self) -> list[Entry]:
        for key in sorted(self.labels.keys() - self.payloads.keys() | self.empty):
            lacking = ": its file is empty" if key in self.empty else f" (KEY.{' or KEY.'.join(self.extensions)})"
            self.report(f"{self.path}: sample {key!r} has no data{lacking}")
        without_data = [key for key in dict.fromkeys((*self.labels, *sorted(self.empty))) if key not in self.payloads]
        found = self.payloads | dict.fromkeys(without_data, (0, 0, 0))
        return [Entry(key, offset, size, self.labels.get(key, NO_LABEL), crc32)
                for key, (offset, size, crc32) in found.items()]


def no_number(path: Path | str, key: str, data: bytes) -> str:
    """What is said of a label that is none."""
    return (f"{path}: label of sample {key!r} is {data[:40]!r}; it must be a class number, such as 207 (or class names "
            "all of them)")


def _read(file: BinaryIO, member: Member) -> bytes:
    data = os.pread(file.fileno(), member.size, member.offset)
    if len(data) != member.size:
        raise InputError(f"{file.name} is cut off in {member.name!r}; copy it again or write it anew")
    return data


def _split_name(path: Path, name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member: its name is cut at the first dot of its last part."""
    *folders, base = name.split("/")
    if name.startswith("/") or ".." in (*folders, base) or "\0" in name:
        raise InputError(f"{path}: member name {name!r} leads outside its directory; such tars are refused")
    stem, _, extension = base.partition(".")
    parts = [part for part in folders if part not in ("", ".")]
    # Bytes that are no UTF-8 are written out.
    key = "/".join([*parts, stem]).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return stem and key, extension.lower()


def left_out(tally: Counter) -> Counter:
    """The members of a tally that are neither data nor labels nor captions, by reason."""
    return Counter({reason: count for reason, count in tally.items() if reason not in (SAMPLES, LABELS, CAPTIONS)})


def in_words(counts: Counter) -> str:
    """Counts by what is counted, in one line, the most frequent first."""
    return ", ".join(f"{count} {reason}"
                     for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
