"""Random access to the samples inside WebDataset tars.

A directory of tars carries two sidecars: `index.json` (classes, shards with size and SHA-256) and `index.npz`
(one row per sample: where its data lies in which shard, its label, CRC-32 and key). Tars that come without
them are scanned on first use.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from gigatok_ds.data.shard_files import INDEX_FILE, REBUILD, TABLE_FILE, LocalFiles, ShardFiles
from gigatok_ds.errors import InputError

FORMAT = "gigatok-ds-shards/1"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
OPEN_SHARDS = 128  # files held open at once by one index in one process; far below the usual limit of 1024

_TABLE_TYPES = {"shard": np.int32, "offset": np.int64, "size": np.int64, "label": np.int32,
                "crc32": np.uint32}
_BLOCK = 512  # of the tar format
_UNSAFE = re.compile(r"[^\w+=@-]")  # a key ends at the first dot, and must be usable as a file name

logger = logging.getLogger(__name__)


class Entry(NamedTuple):
    """One sample of a tar: `size` bytes of image or codes at byte `offset`."""

    key: str
    offset: int
    size: int
    label: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar: file name, size in bytes, SHA-256 in hexadecimal, number of samples."""

    name: str
    size: int
    sha256: str
    samples: int


def safe_key(text: str) -> str:
    """`text` with everything that a key may not hold (slashes, dots, spaces, ...) replaced by underscores."""
    return _UNSAFE.sub("_", text)


def is_safe_key(key: str) -> bool:
    """Whether `key` is not empty and holds only letters, digits and _ + = @ -."""
    return bool(key) and not _UNSAFE.search(key)


def scan_tar(path: Path, extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> list[Entry]:
    """The samples of a WebDataset tar, in its order: members KEY.cls and KEY.x with one x of `extensions`.

    Directories in a member's name become part of the key; other members are ignored. Raises InputError,
    naming shard and sample, when the tar is compressed, cut off or damaged, holds links or names that lead
    outside, or when a sample lacks its data or its label, has one of them twice, or its label is not an
    integer.
    """
    payloads: dict[str, tuple[int, int, int]] = {}
    labels: dict[str, int] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                key, extension = _split_name(path, member.name)
                if member.isdir() or not key or extension not in (*extensions, "cls"):
                    continue
                if not member.isreg() or member.issparse():
                    raise InputError(f"{path}: {member.name!r} is not a plain file; links are not followed")
                if key in (labels if extension == "cls" else payloads):
                    raise InputError(f"{path}: sample {key!r} occurs twice; keys must be unique")
                data = tar.extractfile(member).read()
                if extension == "cls":
                    labels[key] = _parse_label(path, key, data)
                else:
                    payloads[key] = (member.offset_data, member.size, zlib.crc32(data))
    except tarfile.TarError as error:
        raise InputError(f"{path} is not a whole uncompressed tar ({error}); write it again") from None
    with open(path, "rb") as file:
        check_end(file, end, str(path))
    for key in sorted(labels.keys() ^ payloads.keys()):
        lacking = "label (KEY.cls)" if key in payloads else f"data (KEY.{' or KEY.'.join(extensions)})"
        raise InputError(f"{path}: sample {key!r} has no {lacking}")
    return [Entry(key, offset, size, labels[key], crc32) for key, (offset, size, crc32) in payloads.items()]


def _split_name(path: Path, name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member: its name is cut at the first dot of its last part."""
    *folders, base = name.split("/")
    if name.startswith("/") or ".." in (*folders, base):
        raise InputError(f"{path}: member name {name!r} leads outside its directory; such tars are refused")
    stem, _, extension = base.partition(".")
    parts = [part for part in folders if part not in ("", ".")]
    return stem and safe_key("/".join([*parts, stem])), extension.lower()


def _parse_label(path: Path, key: str, data: bytes) -> int:
    if not re.fullmatch(rb"-?[0-9]{1,9}", data.strip()):
        raise InputError(f"{path}: label of sample {key!r} is {data[:40]!r}; it must be a class number, such "
                         "as 207")
    return int(data)


def check_end(tar: BinaryIO, end: int, name: str) -> None:
    """InputError, naming the tar, unless it ends where its last member does.

    tarfile takes a damaged header after the first member for the end of the archive, without a word.
    """
    tar.seek(end)
    if tar.read(_BLOCK) != bytes(_BLOCK):
        raise InputError(f"{name} is cut off or damaged at byte {end}; copy or write it again")


def describe_shard(path: Path, entries: list[Entry]) -> Shard:
    """Name, size, hash and number of samples of the tar at `path`."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(name=path.name, size=path.stat().st_size, sha256=digest, samples=len(entries))


def build_table(shards: list[Shard], entries: list[list[Entry]]) -> dict[str, np.ndarray]:
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
                    "key": np.array([entry.key for _, entry in rows])}


def write_index(directory: Path, shards: list[Shard], table: dict[str, np.ndarray],
                classes: list[str]) -> None:
    """Write both sidecars: `index.json` comes last and holds the hash of `index.npz` (no mixed pairs)."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: table[name] for name in sorted(table)})
    data = buffer.getvalue()
    description = {"format": FORMAT, "classes": classes, "count": len(table["label"]),
                   "table_sha256": hashlib.sha256(data).hexdigest(),
                   "shards": [dataclasses.asdict(shard) for shard in shards]}
    write_atomically(directory / TABLE_FILE, data)
    write_atomically(directory / INDEX_FILE, (json.dumps(description, indent=1) + "\n").encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either whole or absent (or as it was)."""
    with written_aside(path) as file:
        file.write(data)


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end, whole even after a power failure, or is removed.

    Of a process that is killed a hidden file stays, named `path.name` between dots.
    """
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def scan_shards(files: ShardFiles, names: list[str], extensions: tuple[str, ...]
                ) -> tuple[list[Shard], dict[str, np.ndarray]]:
    """Shards and table of the tars of these names, in this order. Raises what `scan_tar` and `build_table` raise."""
    shards, entries = [], []
    for name in tqdm(names, desc=f"indexing {files.location}", unit="shard", disable=None):
        with files.held(name) as path:
            entries.append(scan_tar(path, extensions))
            shards.append(describe_shard(path, entries[-1]))
    try:
        return shards, build_table(shards, entries)
    except InputError as error:
        raise InputError(f"{files.location}: {error}") from None


class ShardIndex:
    """The samples of a set of tars, numbered from 0 in shard order.

    `classes` holds the class names, or nothing when the tars came without them; `labels` is int32 (N,).
    Reading uses positioned reads, which share no file offset: an index may be used on both sides of a fork,
    and it can be pickled.
    """

    def __init__(self, tars: ShardFiles, shards: list[Shard], classes: list[str], table: dict[str, np.ndarray]):
        self.tars = tars
        self.shards = shards
        self.classes = classes
        self.labels = table["label"]
        self._table = table
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()

    @classmethod
    def open(cls, directory: str | Path, extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> ShardIndex:
        """Open a directory of tars, indexing it first when it has no index; `remote.open_shards` opens URLs, too.

        A new index is also written into the directory if that is writable. Raises InputError when the
        directory holds no tars, when its index is damaged, or when a shard is missing, new or of another size
        than indexed; and what `scan_tar` raises.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise InputError(f"shard directory {directory} does not exist or is not a directory")
        names = sorted(path.name for path in directory.glob("*.tar") if not path.name.startswith("."))
        if not names:
            raise InputError(f"{directory} holds no shards: looked for uncompressed *.tar files")
        if not (directory / INDEX_FILE).is_file():
            return cls._scan(directory, names, extensions)
        try:
            shards, classes, table = load_index(directory)
        except InputError as error:
            raise InputError(f"the index of {directory} is damaged ({error}); {REBUILD}") from None
        unknown = sorted(set(names) - {shard.name for shard in shards})
        if unknown:
            raise InputError(f"shard {directory / unknown[0]} is not in the index; {REBUILD}")
        index = cls(LocalFiles(directory), shards, classes, table)
        for shard in shards:
            index._check_size(shard, directory / shard.name)
        return index

    @classmethod
    def _scan(cls, directory: Path, names: list[str], extensions: tuple[str, ...]) -> ShardIndex:
        files = LocalFiles(directory)
        shards, table = scan_shards(files, names, extensions)
        try:
            write_index(directory, shards, table, classes=[])
        except OSError as error:
            logger.warning("%s: the index is kept in memory only; the next start scans again (%s)",
                           directory, error)
        return cls(files, shards, [], table)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def location(self) -> str:
        """The directory, URL or command that the tars come from."""
        return self.tars.location

    def identity(self) -> str:
        """SHA-256, in hexadecimal, over the shards' hashes, in their order, and the class names."""
        content = [self.classes, [[shard.sha256, shard.samples] for shard in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def label(self, i: int) -> int:
        """The class number of sample `i`, as stored; see `check_labels`."""
        return int(self.labels[i])

    def key(self, i: int) -> str:
        """The key of sample `i`: unique, and safe as a file name (else InputError)."""
        key = str(self._table["key"][i])
        if not is_safe_key(key):
            raise InputError(f"{self.location}/{TABLE_FILE}: key {key!r} is not a safe name; {REBUILD}")
        return key

    def place(self, i: int) -> tuple[str, int, int]:
        """(tar's file name, offset, size) of the data of sample `i`."""
        number, offset, size = (int(self._table[column][i]) for column in ("shard", "offset", "size"))
        return self.shards[number].name, offset, size

    def entries(self) -> Iterator[list[Entry]]:
        """The samples of each shard as they were indexed."""
        numbers = self._table["shard"]
        ends = np.cumsum(np.bincount(numbers, minlength=len(self.shards)))
        for rows in np.split(np.argsort(numbers, kind="stable"), ends[:-1]):
            columns = [self._table[name][rows].tolist() for name in Entry._fields]
            yield [Entry(*row) for row in zip(*columns, strict=True)]

    def read(self, i: int) -> bytes:
        """The data of sample `i`. Raises InputError when its shard has changed since it was indexed."""
        number, offset, size, crc32 = (int(self._table[column][i])
                                       for column in ("shard", "offset", "size", "crc32"))
        data = os.pread(self._file(number).fileno(), size, offset)
        if len(data) != size or zlib.crc32(data) != crc32:
            raise InputError(f"sample {self.key(i)!r} in {self.tars.name(self.shards[number].name)} is damaged or has "
                             f"changed since it was indexed; {self.tars.advice}")
        return data

    def check_labels(self, num_classes: int) -> None:
        """Raise InputError, naming the first such sample, when a label is not in 0 ... num_classes - 1."""
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))
        if len(wrong):
            i = int(wrong[0])
            raise InputError(f"{self.location}: sample {self.key(i)!r} has label {self.label(i)}; a model "
                             f"with num_classes {num_classes} allows 0 to {num_classes - 1} "
                             f"({len(wrong)} such samples)")

    def _check_size(self, shard: Shard, file: Path | int) -> None:
        name, advice = self.tars.name(shard.name), self.tars.advice
        try:
            size = os.stat(file).st_size
        except FileNotFoundError:
            raise InputError(f"shard {name} is missing; {advice}") from None
        if size != shard.size:
            raise InputError(f"shard {name} has changed since it was indexed: {size} bytes, not {shard.size}; {advice}")

    def _file(self, number: int) -> io.FileIO:
        if number not in self._files:
            self._close_removed()
            shard = self.shards[number]
            with self.tars.held(shard.name, shard) as path:
                file = open(path, "rb", buffering=0)
            self._check_size(shard, file.fileno())
            self._files[number] = file
            if len(self._files) > OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(number)
        return self._files[number]

    def _close_removed(self) -> None:
        """Tars that were removed to make room take it up until nobody has them open."""
        if self.tars.transient:
            for number in [number for number, file in self._files.items() if not os.fstat(file.fileno()).st_nlink]:
                self._files.pop(number).close()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": OrderedDict()}


def load_index(directory: Path) -> tuple[list[Shard], list[str], dict[str, np.ndarray]]:
    """Shards, class names and table of both sidecars.

    Nothing in them may lead outside the directory or its shards: then, or when they are damaged, InputError says why.
    """
    try:
        description = json.loads((directory / INDEX_FILE).read_bytes())
        if description["format"] != FORMAT:
            raise InputError(f"its format is {description['format']!r}, this version reads {FORMAT!r}")
        shards = [Shard(**shard) for shard in description["shards"]]
        classes = [str(name) for name in description["classes"]]
        data = (directory / TABLE_FILE).read_bytes()
        if hashlib.sha256(data).hexdigest() != description["table_sha256"]:
            raise InputError(f"{TABLE_FILE} does not belong to {INDEX_FILE}")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            table = {name: arrays[name].astype(kind, casting="safe") for name, kind in _TABLE_TYPES.items()}
            table["key"] = arrays["key"]
        _check_table(description["count"], shards, table)
    except (ValueError, KeyError, TypeError, FileNotFoundError, zipfile.BadZipFile) as error:
        raise InputError(str(error)) from None
    return shards, classes, table


def _check_table(count: int, shards: list[Shard], table: dict[str, np.ndarray]) -> None:
    for shard in shards:
        if shard.name != os.path.basename(shard.name) or shard.name in ("", ".", ".."):
            raise InputError(f"shard name {shard.name!r} leads outside the directory")
    stored = sum(shard.samples for shard in shards)
    if {len(column) for column in table.values()} != {count} or count != stored:
        raise InputError("the numbers of samples disagree")
    number, offset, size = table["shard"], table["offset"], table["size"]
    if count == 0 or number.min() < 0 or number.max() >= len(shards) or offset.min() < 0 or size.min() < 0:
        raise InputError("a sample lies in no shard")
    if (offset + size > np.array([shard.size for shard in shards])[number]).any():
        raise InputError("a sample lies beyond the end of its shard")
