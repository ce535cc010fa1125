"""Random access to the samples inside WebDataset tars.

A directory of tars carries an index (shards.contents). Tars that come without one are scanned on first use.
"""

from __future__ import annotations

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

import numpy as np
from tqdm import tqdm

from gigatok_ds.errors import InputError
from gigatok_ds.shards.class_labels import StoredLabels, renumbered
from gigatok_ds.shards.contents import (
    INDEX_FILE,
    TABLE_FILE,
    Contents,
    TarShard,
    build_table,
    describe_shard,
    load_index,
    write_index,
)
from gigatok_ds.shards.freshness import check_fresh
from gigatok_ds.shards.rereading import reread
from gigatok_ds.shards.shard_files import REBUILD, LocalFiles, ShardFiles, most_open
from gigatok_ds.shards.tar_members import is_compressed_tar, is_tar
from gigatok_ds.shards.tar_scan import (
    CAPTION,
    IMAGE_EXTENSIONS,
    LABELS,
    NO_LABEL,
    SAMPLES,
    Entry,
    in_words,
    is_key,
    left_out,
    members_by_key,
    no_number,
    scan_tar,
)

PATIENCE = 600.0  # seconds for which what cannot be read is tried again, unless said otherwise

_READ_AHEAD = 2**17  # bytes: Linux reads no more for one request

logger = logging.getLogger(__name__)


def scan_shards(files: ShardFiles, names: list[str], extensions: tuple[str, ...],
                max_bad_fraction: float = 0.0, tally: Counter | None = None) -> Contents:
    """Read the tars of these names, in this order; `tally` is `scan_tar`'s. What is left out of them is logged.

    Raises what `scan_tar`, `build_table` and `check_problems` raise.
    """
    shards: list[TarShard] = []
    entries: list[list[Entry]] = []
    problems: list[str] = []
    labels = StoredLabels()
    tally = Counter() if tally is None else tally
    for name in tqdm(names, desc=f"indexing {files.location}", unit="shard", disable=None):
        with files.held(name) as path:
            entries.append(scan_tar(path, extensions, problems if max_bad_fraction else None, tally, labels))
            shards.append(describe_shard(path, entries[-1]))
    if rest := left_out(tally):
        logger.warning("%s: of %d members of %d tars, %d are the data of samples and %d their labels; left out: %s",
                       files.location, tally.total(), len(names), tally[SAMPLES], tally[LABELS], in_words(rest))
    try:
        table = build_table(shards, entries)
    except InputError as error:
        raise InputError(f"{files.location}: {error}") from None
    classes, table["label"] = labels.settle(table["label"])
    named = np.flatnonzero(table["label"] >= StoredLabels.FIRST_NAME)
    problems[:0] = [no_number(files.name(names[table["shard"][row]]), table["key"][row].decode(),
                              labels.name(int(table["label"][row])).encode()) for row in named]
    table["label"][named] = NO_LABEL
    contents = Contents(shards, classes, table, problems)
    contents.check_problems(max_bad_fraction)
    return contents


class ShardIndex:
    """The samples of a set of tars, numbered from 0 in shard order.

    `classes` holds the class names, or nothing when the tars came without them; `labels` is int32 (N,).
    Reading uses positioned reads, which share no file offset: an index may be used on both sides of a fork,
    and it can be pickled.
    """

    def __init__(self, tars: ShardFiles, contents: Contents, identity: str | None = None):
        """identity: what `identity` is to say, if not what it finds."""
        self.tars, self._identity = tars, identity
        self.shards = contents.shards
        self.classes = self._named = contents.classes
        self.labels = contents.table["label"]
        self._table = contents.table
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()
        self.patience = PATIENCE  # seconds
        self._captions: tuple[int, dict[str, tuple[int, int]]] | None = None  # of one tar: places by key
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
            check_fresh(directory, directory / INDEX_FILE, [shard.name for shard in contents.shards], contents.table,
                        contents.classes)
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
        if self._identity is not None:
            return self._identity
        content = [self._named, [[shard.sha256, shard.samples] for shard in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def table(self) -> dict[str, np.ndarray]:
        """A row for each sample: see shards.contents. Labels are as they were stored."""
        return self._table

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

    def caption(self, i: int) -> bytes | None:
        """The text KEY.txt that goes with sample `i`, as it is stored, if there is one. Samples are to be asked for in
        their order, for each tar is looked through anew.
        """
        number = int(self._table["shard"][i])
        if self._captions is None or self._captions[0] != number:
            with self.tars.held(self.shards[number].name, self.shards[number]) as path:
                self._captions = number, members_by_key(path, CAPTION)
        if (place := self._captions[1].get(self.key(i))) is None:
            return None
        return reread(lambda: os.pread(self._file(number).fileno(), place[1], place[0]),
                      self.tars.name(self.shards[number].name), self.patience, before=lambda: self._close(number))

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
        self.check_labelled()
        for wrong, cause in ((np.flatnonzero(self.labels >= num_classes), self._likely_cause(num_classes)),
                             (np.flatnonzero(self.labels < 0), "")):
            if len(wrong) > (0 if cause else max_bad_fraction * len(self)):
                try:
                    self.check_label(int(wrong[0]), num_classes)
                except InputError as error:
                    raise InputError(f"{error} ({len(wrong)} such samples){cause}") from None

    def check_labelled(self, *, every: bool = False) -> None:
        """Raise InputError when no sample has a label, or not every one."""
        if every and (lacking := np.flatnonzero(self.labels == NO_LABEL)).size not in (0, len(self)):
            raise InputError(f"{self.location}: {lacking.size} of {len(self)} images have no label, which is needed "
                             f"here, the first of them sample {self.key(int(lacking[0]))!r}; give them one, or leave "
                             "them out")
        if self.labels.max() == NO_LABEL == self.labels.min():
            raise InputError(f"{self.location} has no labels, which are needed here (only tokenizers do without); "
                             "gigatok-ds make-shards --labels, or --label-field, adds them")

    def count_classes(self) -> int:
        """How many classes labels are of: all that have names or else, if none has, up to the largest label."""
        self.check_labelled()
        return len(self.classes) or int(self.labels.max()) + 1

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

    def has_label(self, num_classes: int) -> np.ndarray:
        """Of which samples the label is 0 or more, and below `num_classes`: bool (N,)."""
        return (self.labels >= 0) & (self.labels < num_classes)

    def check_label(self, i: int, num_classes: int) -> None:
        """Raise InputError when sample `i` has no label, or one that is not below `num_classes`."""
        label = self.label(i)
        if not 0 <= label < num_classes:
            raise InputError(f"{self.tars.name(self.place(i)[0])}: sample {self.key(i)!r} has label {label}; a model "
                             f"with num_classes {num_classes} allows 0 to {num_classes - 1}")

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
