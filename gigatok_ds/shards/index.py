"""Random access to the samples inside WebDataset tars.

A directory of tars carries two sidecars: `index.json` (classes, shards with size and SHA-256) and `index.npz`
(one row per sample: where its data lies in which shard, its label, CRC-32 and key, in UTF-8). Tars that come without
them are scanned on first use.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from gigatok_ds.errors import InputError
from gigatok_ds.files import write_atomically
from gigatok_ds.npy_files import read_npz
from gigatok_ds.plain import from_plain
from gigatok_ds.shards.class_labels import renumbered
from gigatok_ds.shards.freshness import check_fresh
from gigatok_ds.shards.rereading import reread
from gigatok_ds.shards.shard_files import INDEX_FILE, REBUILD, TABLE_FILE, LocalFiles, ShardFiles, most_open
from gigatok_ds.shards.tar_members import is_compressed_tar, is_tar
from gigatok_ds.shards.tar_scan import IMAGE_EXTENSIONS, LABELS, SAMPLES, Entry, in_words, is_key, left_out, scan_tar
from gigatok_ds.shards.tar_shard import TarShard, describe_shard
from gigatok_ds.untrusted import brief, parse_json

FORMAT = "gigatok-ds-shards/2"
PATIENCE = 600.0  # seconds for which what cannot be read is tried again, unless said otherwise

_READ_AHEAD = 2**17  # bytes: Linux reads no more for one request

_TABLE_TYPES = {"shard": np.int32, "offset": np.int64, "size": np.int64, "label": np.int32,
                "crc32": np.uint32}

logger = logging.getLogger(__name__)


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


def scan_shards(files: ShardFiles, names: list[str], extensions: tuple[str, ...],
                max_bad_fraction: float = 0.0, tally: Counter | None = None) -> Contents:
    """Read the tars of these names, in this order; `tally` is `scan_tar`'s. What is left out of them is logged.

    Raises what `scan_tar`, `build_table` and `check_problems` raise.
    """
    shards: list[TarShard] = []
    entries: list[list[Entry]] = []
    problems: list[str] = []
    tally = Counter() if tally is None else tally
    for name in tqdm(names, desc=f"indexing {files.location}", unit="shard", disable=None):
        with files.held(name) as path:
            entries.append(scan_tar(path, extensions, problems if max_bad_fraction else None, tally))
            shards.append(describe_shard(path, entries[-1]))
    if rest := left_out(tally):
        logger.warning("%s: of %d members of %d tars, %d are the data of samples and %d their labels; left out: %s",
                       files.location, tally.total(), len(names), tally[SAMPLES], tally[LABELS], in_words(rest))
    try:
        contents = Contents(shards, [], build_table(shards, entries), problems)
    except InputError as error:
        raise InputError(f"{files.location}: {error}") from None
    contents.check_problems(max_bad_fraction)
    return contents


class ShardIndex:
    """The samples of a set of tars, numbered from 0 in shard order.

    `classes` holds the class names, or nothing when the tars came without them; `labels` is int32 (N,).
    Reading uses positioned reads, which share no file offset: an index may be used on both sides of a fork,
    and it can be pickled.
    """

    def __init__(self, tars: ShardFiles, contents: Contents):
        self.tars = tars
        self.shards = contents.shards
        self.classes = self._named = contents.classes
        self.labels = contents.table["label"]
        self._table = contents.table
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()
        self.patience = PATIENCE  # seconds
        self._read_ahead: dict[int, int] = {}  # the epoch in which a tar was last read ahead

    @classmethod
    def open(cls, directory: str | Path, extensions: tuple[str, ...] = IMAGE_EXTENSIONS, *,
             max_bad_fraction: float = 0.0, compare: bool = True) -> ShardIndex:
        """Open a directory of tars, indexing it first when it has no index; `remote.open_shards` opens URLs, too.

        A new index is also written into the directory if that is writable. Raises InputError when the
        directory holds no tars, when its index is damaged, or when a shard is missing, new or of another size
        than indexed; or, with `compare`, has other labels (`check_fresh`); and what `scan_tar` raises. It tolerates as
        many of its problems as `max_bad_fraction` of the samples.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise InputError(f"shard directory {directory} does not exist or is not a directory")
        there = sorted(os.listdir(directory))
        names = [name for name in there if is_tar(name)]
        if packed := [name for name in there if is_compressed_tar(name)]:
            raise InputError(f"{directory / packed[0]} is compressed ({len(packed)} such files there); decompress it, "
                             "or move it away")
        if not names:
            raise InputError(f"{directory} holds no shards: looked for uncompressed *.tar files")
        if not (directory / INDEX_FILE).is_file():
            return cls._scan(directory, names, extensions, max_bad_fraction)
        try:
            contents = load_index(directory)
        except InputError as error:
            raise InputError(f"the index of {directory} is damaged ({error}); {REBUILD}") from None
        unknown = sorted(set(names) - {shard.name for shard in contents.shards})
        if unknown:
            raise InputError(f"shard {directory / unknown[0]} is not in the index; {REBUILD}")
        contents.check_problems(max_bad_fraction)
        index = cls(LocalFiles(directory), contents)
        for shard in contents.shards:
            index._check_size(shard, directory / shard.name)
        if compare:
            check_fresh(directory, directory / INDEX_FILE, [shard.name for shard in contents.shards], contents.table)
        return index

    @classmethod
    def _scan(cls, directory: Path, names: list[str], extensions: tuple[str, ...],
              max_bad_fraction: float) -> ShardIndex:
        files = LocalFiles(directory)
        contents = scan_shards(files, names, extensions, max_bad_fraction)
        try:
            write_index(directory, contents)
        except OSError as error:
            logger.warning("%s: the index is kept in memory only; the next start scans again (%s)",
                           directory, error)
        return cls(files, contents)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def location(self) -> str:
        """The directory, URL or command that the tars come from."""
        return self.tars.location

    def identity(self) -> str:
        """SHA-256, in hexadecimal, over the shards' hashes, in their order, and the class names."""
        content = [self._named, [[shard.sha256, shard.samples] for shard in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def shard_numbers(self) -> np.ndarray:
        """The number of each sample's tar: int32 (N,)."""
        return self._table["shard"]

    def label(self, i: int) -> int:
        """The class number of sample `i`, as stored; see `check_labels`."""
        return int(self.labels[i])

    def key(self, i: int) -> str:
        """The key of sample `i`: unique, and the name of no file outside a directory (else InputError)."""
        stored = self._table["key"][i]
        try:
            if is_key(key := stored.decode()):
                return key
        except UnicodeDecodeError:
            pass
        raise InputError(f"{self.location}/{TABLE_FILE}: key {stored!r} is not a safe name; {REBUILD}")

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
            yield [Entry(key.decode(errors="replace"), *row) for key, *row in zip(*columns, strict=True)]

    def read(self, i: int) -> bytes:
        """The data of sample `i`. Raises InputError when its shard has changed since it was indexed."""
        number, offset, size, crc32 = (int(self._table[column][i])
                                       for column in ("shard", "offset", "size", "crc32"))
        name = self.tars.name(self.shards[number].name)
        data = reread(lambda: os.pread(self._file(number).fileno(), size, offset), name, self.patience,
                      before=lambda: self._close(number))
        if len(data) != size or zlib.crc32(data) != crc32:
            raise InputError(f"sample {self.key(i)!r} in {self.tars.name(self.shards[number].name)} is damaged or has "
                             f"changed since it was indexed; {self.tars.advice}")
        return data

    def read_ahead(self, i: int, epoch: int) -> None:
        """Have the operating system read the whole tar of sample `i`, in one run, once in each epoch."""
        number = int(self._table["shard"][i])
        if self._read_ahead.get(number) != epoch and hasattr(os, "posix_fadvise"):
            self._read_ahead[number] = epoch
            with suppress(OSError):  # reading will tell
                file = self._file(number).fileno()
                for offset in range(0, self.shards[number].size, _READ_AHEAD):
                    os.posix_fadvise(file, offset, _READ_AHEAD, os.POSIX_FADV_WILLNEED)

    def check_labels(self, num_classes: int, max_bad_fraction: float = 0.0) -> None:
        """Raise InputError, naming the first such sample, for labels that are not below `num_classes`.

        And when more than that fraction of the samples have none, or a negative one.
        """
        for wrong, cause in ((np.flatnonzero(self.labels >= num_classes), self._likely_cause(num_classes)),
                             (np.flatnonzero(self.labels < 0), "")):
            if len(wrong) > (0 if cause else max_bad_fraction * len(self)):
                try:
                    self.check_label(int(wrong[0]), num_classes)
                except InputError as error:
                    raise InputError(f"{error} ({len(wrong)} such samples){cause}") from None

    def _likely_cause(self, num_classes: int) -> str:
        low, high = int(self.labels[self.labels >= 0].min(initial=num_classes)), int(self.labels.max())
        if low == 1 and high == num_classes:
            return f": labels 1 to {high} are counted from 1, and must be from 0; subtract 1 from each, and index again"
        return f": labels go up to {high}; set model.num_classes to at least {high + 1}, or give the data it is for"

    def number_as(self, classes: Sequence[str], source: str | Path) -> None:
        """Give labels the numbers that the same class names have in `classes`, those of `source`.

        Nothing happens where one of both does not name its classes. Raises InputError for a name that is not in them.
        """
        self.labels = renumbered(self.labels, self.classes, classes, self.location, source)
        self.classes = list(classes) if self.classes and classes else self.classes

    def has_label(self, num_classes: int | None) -> np.ndarray:
        """Of which samples the label is 0 or more, and below `num_classes` if that is given: bool (N,)."""
        return (self.labels >= 0) & (True if num_classes is None else self.labels < num_classes)

    def check_label(self, i: int, num_classes: int | None) -> None:
        """Raise InputError when sample `i` has no label, or one that is not below `num_classes`."""
        label = self.label(i)
        if label < 0 or (num_classes is not None and label >= num_classes):
            allowed = "it must be 0 or more" if num_classes is None else (
                f"a model with num_classes {num_classes} allows 0 to {num_classes - 1}")
            tar = self.tars.name(self.place(i)[0])
            raise InputError(f"{tar}: sample {self.key(i)!r} has label {label}; {allowed}")

    def _check_size(self, shard: TarShard, file: Path | int) -> None:
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
                file = open(path, "rb", buffering=0)  # noqa: SIM115 (stays open, as one of `most_open`)
            self._check_size(shard, file.fileno())
            self._files[number] = file
            if len(self._files) > most_open():
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(number)
        return self._files[number]

    def _close(self, number: int) -> None:
        """To be opened anew: a file whose server has lost it stays lost."""
        if file := self._files.pop(number, None):
            with suppress(OSError):
                file.close()

    def _close_removed(self) -> None:
        """Tars that were removed to make room take it up until nobody has them open."""
        if self.tars.transient:
            for number in [number for number, file in self._files.items() if not os.fstat(file.fileno()).st_nlink]:
                self._files.pop(number).close()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": OrderedDict()}


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
