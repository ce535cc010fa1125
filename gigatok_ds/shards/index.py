"""Random access to the samples inside WebDataset tars.

A directory of tars carries an index (shards.contents). Tars that come without one are scanned on first use.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gigatok_ds.cluster.launched import launched_rank_or_alone
from gigatok_ds.errors import InputError
from gigatok_ds.file_kinds import is_compressed_tar, is_tar
from gigatok_ds.shards.class_labels import StoredLabels, numbering
from gigatok_ds.shards.contents import (
    INDEX_FILE,
    TABLE_FILE,
    Contents,
    TarShard,
    build_table,
    columns_of,
    describe_shard,
    load_index,
    write_index,
)
from gigatok_ds.shards.freshness import check_fresh
from gigatok_ds.shards.rereading import reread
from gigatok_ds.shards.sample_table import parts_of
from gigatok_ds.shards.shard_files import REBUILD, LocalFiles, ShardFiles, most_open
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

_NEAR = 1024  # labels
_READ_AHEAD = 2**17  # bytes: Linux reads no more for one request

logger = logging.getLogger(__name__)


def scan_shards(files: ShardFiles, names: list[str], extensions: tuple[str, ...],
                max_bad_fraction: float = 0.0, tally: Counter | None = None) -> Contents:
    """Read the tars of these names, in this order; `tally` is `scan_tar`'s. What is left out of them is logged.

    Raises what `scan_tar`, `build_table` and `check_problems` raise.
    """
    shards: list[TarShard] = []
    columns: list[dict[str, np.ndarray]] = []
    problems: list[str] = []
    labels = StoredLabels()
    tally = Counter() if tally is None else tally
    for name in tqdm(names, desc=f"indexing {files.location}", unit="shard", disable=None):
        with files.held(name) as path:
            entries = scan_tar(path, extensions, problems if max_bad_fraction else None, tally, labels)
            shards.append(describe_shard(path, entries))
            columns.append(columns_of(entries))
    if rest := left_out(tally):
        logger.warning("%s: of %d members of %d tars, %d are the data of samples and %d their labels; left out: %s",
                       files.location, tally.total(), len(names), tally[SAMPLES], tally[LABELS], in_words(rest))
    try:
        table = build_table(shards, columns)
    except InputError as error:
        raise InputError(f"{files.location}: {error}") from None
    classes, settled = labels.settle(table.labels())
    named = np.flatnonzero(settled >= StoredLabels.FIRST_NAME).tolist()
    problems[:0] = [no_number(files.name(names[table.tar(row)]), table.key(row).decode(),
                              labels.name(int(settled[row])).encode()) for row in named]
    settled[named] = NO_LABEL
    table.columns["label"] = settled
    contents = Contents(shards, classes, table, problems)
    contents.check_problems(max_bad_fraction)
    return contents


class ShardIndex:
    """The samples of a set of tars, numbered from 0 in shard order.

    `classes` holds the class names, or nothing when the tars came without them.
    Reading uses positioned reads, which share no file offset: an index may be used on both sides of a fork,
    and it can be pickled.
    """

    def __init__(self, tars: ShardFiles, contents: Contents, identity: str | None = None):
        """identity: what `identity` is to say, if not what it finds."""
        self.tars, self._identity = tars, identity
        self.shards = contents.shards
        self.classes = self._named = contents.classes
        self.table = contents.table
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
        # By one rank of a host: a file system that many hosts share is asked for each tar by each of them as it is.
        if launched_rank_or_alone().is_first_of_host:
            changed = [index._check_size(shard, directory / shard.name).st_mtime_ns for shard in contents.shards]
            if compare:
                check_fresh(directory, directory / INDEX_FILE, contents, changed)
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
        return len(self.table)

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
    def labels(self) -> np.ndarray:
        """All class numbers, int32 (N,): of very many samples, better ask for the `label` of those of interest."""
        return self.table.labels()

    def label(self, i: int) -> int:
        """The class number of sample `i`; see `check_labels`."""
        return self.table.row(i).label

    def key(self, i: int) -> str:
        """The key of sample `i`: unique, and the name of no file outside a directory (else InputError)."""
        stored = self.table.key(i)
        try:
            if is_key(key := stored.decode()):
                return key
        except UnicodeDecodeError:
            pass
        raise InputError(f"{self.location}/{TABLE_FILE}: key {stored!r} is not a safe name; {REBUILD}")

    def place(self, i: int) -> tuple[str, int, int]:
        """(tar's file name, offset, size) of the data of sample `i`."""
        row = self.table.row(i)
        return self.shards[row.tar].name, row.offset, row.size

    def entries(self) -> Iterator[list[Entry]]:
        """The samples of each shard as they were indexed."""
        end = 0
        for samples in self.table.counts.tolist():
            first, end = end, end + samples
            yield [Entry(self.table.key(i).decode(errors="replace"), *self.table.row(i)[1:]) for i in range(first, end)]

    def read(self, i: int) -> bytes:
        """The data of sample `i`. Raises InputError when its shard has changed since it was indexed."""
        number, offset, size, _, crc32 = self.table.row(i)
        name = self.tars.name(self.shards[number].name)
        data = reread(lambda: os.pread(self._file(number).fileno(), size, offset), name, self.patience,
                      before=lambda: self._close(number))
        if len(data) != size or zlib.crc32(data) != crc32:
            raise InputError(f"sample {self.key(i)!r} in {name} is damaged or has "
                             f"changed since it was indexed; {self.tars.advice}")
        return data

    def caption(self, i: int) -> bytes | None:
        """The text KEY.txt that goes with sample `i`, as it is stored, if there is one. Samples are to be asked for in
        their order, for each tar is looked through anew.
        """
        number = self.table.row(i).tar
        if self._captions is None or self._captions[0] != number:
            with self.tars.held(self.shards[number].name, self.shards[number]) as path:
                self._captions = number, members_by_key(path, CAPTION)
        if (place := self._captions[1].get(self.key(i))) is None:
            return None
        return reread(lambda: os.pread(self._file(number).fileno(), place[1], place[0]),
                      self.tars.name(self.shards[number].name), self.patience, before=lambda: self._close(number))

    def read_ahead(self, i: int, epoch: int) -> None:
        """Have the operating system read the whole tar of sample `i`, in one run, once in each epoch."""
        number = self.table.row(i).tar
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
        for allowed, (count, first) in ((0, self._with_label(lambda labels: labels >= num_classes)),
                                        (max_bad_fraction * len(self), self._with_label(lambda labels: labels < 0))):
            if count > allowed:
                try:
                    self.check_label(first, num_classes)
                except InputError as error:
                    cause = self._likely_cause(num_classes) if self.label(first) >= 0 else ""
                    raise InputError(f"{error} ({count} such samples){cause}") from None

    def check_labelled(self, *, every: bool = False) -> None:
        """Raise InputError when no sample has a label, or not every one."""
        lacking, first = self._with_label(lambda labels: labels == NO_LABEL)
        if every and lacking not in (0, len(self)):
            raise InputError(f"{self.location}: {lacking} of {len(self)} images have no label, which is needed here, "
                             f"the first of them sample {self.key(first)!r}; give them one, or leave them out")
        if lacking == len(self):
            raise InputError(f"{self.location} has no labels, which are needed here (only tokenizers do without); "
                             "gigatok-ds make-shards --labels, or --label-field, adds them")

    def is_labelled(self) -> bool:
        """Whether any sample has a label."""
        return self._with_label(lambda labels: labels >= 0)[0] > 0

    def count_classes(self) -> int:
        """How many classes labels are of: all that have names or else, if none has, up to the largest label."""
        self.check_labelled()
        return len(self.classes) or self._label_range()[1] + 1

    def _likely_cause(self, num_classes: int) -> str:
        low, high = self._label_range()
        if low == 1 and high == num_classes:
            return f": labels 1 to {high} are counted from 1, and must be from 0; subtract 1 from each, and index again"
        return f": labels go up to {high}; set model.num_classes to at least {high + 1}, or give the data it is for"

    def number_as(self, classes: Sequence[str], source: str | Path) -> None:
        """Give labels the numbers that the same class names have in `classes`, those of `source`.

        Nothing happens where one of both does not name its classes. Raises InputError for a name that is not in them.
        """
        if not self.classes or not classes:
            return
        used = {int(label) for rows in parts_of(len(self)) for label in np.unique(self.table.labels(rows))}
        position = numbering(used, self.classes, classes, self.location, source)
        if position is not None:
            self.table, self.classes = self.table.numbered(position), list(classes)

    def next_labelled(self, i: int, num_classes: int) -> int | None:
        """The next sample after `i`, in the order of the data and from its end to its beginning, whose label is 0 or
        more, and below `num_classes`; `i` itself if it is the only one, None if there is none.
        """
        def found(rows: slice) -> Iterator[int]:
            labels = self.table.labels(rows)
            return (rows.start + int(place) for place in np.flatnonzero((labels >= 0) & (labels < num_classes))[:1])

        near = min(i + 1 + _NEAR, len(self))  # where there mostly is one
        after = (slice(near + part.start, near + part.stop) for part in parts_of(len(self) - near))
        places = itertools.chain([slice(i + 1, near)], after, parts_of(i + 1))
        return next(itertools.chain.from_iterable(map(found, places)), None)

    def _with_label(self, condition: Callable[[np.ndarray], np.ndarray]) -> tuple[int, int]:
        """How many samples have a label of which that holds, and the number of the first of them (0 if there is none).
        """
        count = first = 0
        for rows in parts_of(len(self)):
            found = np.flatnonzero(condition(self.table.labels(rows)))
            first = rows.start + int(found[0]) if len(found) and not count else first
            count += len(found)
        return count, first

    def _label_range(self) -> tuple[int, int]:
        """The smallest that is not negative, and the largest label."""
        parts = [self.table.labels(rows) for rows in parts_of(len(self))]
        high = max(int(labels.max()) for labels in parts)
        return min(int(labels[labels >= 0].min(initial=max(high, 0))) for labels in parts), high

    def check_label(self, i: int, num_classes: int) -> None:
        """Raise InputError when sample `i` has no label, or one that is not below `num_classes`."""
        label = self.label(i)
        if not 0 <= label < num_classes:
            raise InputError(f"{self.tars.name(self.place(i)[0])}: sample {self.key(i)!r} has label {label}; a model "
                             f"with num_classes {num_classes} allows 0 to {num_classes - 1}")

    def _check_size(self, shard: TarShard, file: Path | int) -> os.stat_result:
        name, advice = self.tars.name(shard.name), self.tars.advice
        try:
            status = os.stat(file)
        except FileNotFoundError:
            raise InputError(f"shard {name} is missing; {advice}") from None
        if status.st_size != shard.size:
            raise InputError(f"shard {name} has changed since it was indexed: {status.st_size} bytes, not "
                             f"{shard.size}; {advice}")
        return status

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
