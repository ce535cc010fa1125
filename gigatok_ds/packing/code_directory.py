"""A directory of code shards that is written by several ranks, interrupted and resumed, and always ends the same.

Shard k holds the samples k * n ... k * n + n - 1. It is written aside and renamed when it is whole, by the rank whose
turn it is. `metadata.partial.json` says from the beginning what the directory will hold; when every shard and the index
are there, it becomes `metadata.json`, without which readers refuse the directory.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from gigatok_ds.cluster.launched import LaunchedRank
from gigatok_ds.data.codes import (
    CODE_EXTENSIONS,
    METADATA_FILE,
    PARTIAL_FILE,
    CodeSample,
    code_records,
    encoded_size,
    metadata_bytes,
)
from gigatok_ds.errors import InputError
from gigatok_ds.files import write_atomically, written_aside
from gigatok_ds.ownership import OWNER_FILE, owned
from gigatok_ds.shards.contents import (
    INDEX_FILE,
    TABLE_FILE,
    Contents,
    build_table,
    columns_of,
    describe_shard,
    write_index,
)
from gigatok_ds.shards.tar_scan import Entry, scan_tar
from gigatok_ds.shards.tar_writer import new_directory, write_tar
from gigatok_ds.untrusted import parse_json

PATIENCE = 1800.0  # seconds without any change in the directory after which the first rank stops waiting for the others
_POLL = 0.5  # seconds between two looks at what the other ranks have written

logger = logging.getLogger(__name__)

# Makes the samples of some shards, given as ranges of sample numbers, one after the other.
MakeSamples = Callable[[list[range]], Iterator[CodeSample]]


@dataclass(frozen=True, kw_only=True)
class CodeDirectory:
    """What a directory is to hold: `metadata` as it will be stored, and the key of each sample number."""

    directory: Path
    metadata: dict
    key: Callable[[int], str]
    classes: list[str]
    samples_per_shard: int

    def __post_init__(self):
        if self.samples_per_shard < 1:
            raise InputError(f"samples per shard is {self.samples_per_shard}; it must be at least 1")

    @property
    def shards(self) -> int:
        return -(-self.metadata["count"] // self.samples_per_shard)

    def numbers(self, shard: int) -> range:
        """The samples of a shard."""
        start = shard * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, self.metadata["count"]))

    def path(self, shard: int) -> Path:
        return self.directory / f"codes-{shard:06d}.tar"

    def fill(self, rank: LaunchedRank, make_samples: MakeSamples) -> None:
        """Write this rank's missing shards (shard k is that of rank k % world_size); the first rank completes the set.

        Nothing is done in a complete directory. Raises InputError when the directory holds something else, was begun
        with other settings or is being written by another job, and what `make_samples` raises; whole shards stay. The
        first rank returns when all is done and raises InputError when for PATIENCE seconds nothing came from ranks that
        it waits for.
        """
        if self.claim():
            return
        if rank.rank > 0:
            self._write_missing(rank, make_samples)
            return
        with owned(self.directory):
            if self.claim():  # the one before has just completed it
                return
            self._write_missing(rank, make_samples)
            self._wait_for_all()
            self._finish()

    def _write_missing(self, rank: LaunchedRank, make_samples: MakeSamples) -> None:
        own = range(rank.rank, self.shards, rank.world_size)
        missing = [shard for shard in own if not self._is_complete(shard)]
        ranges = [self.numbers(shard) for shard in missing]
        total = sum(map(len, ranges))
        name = f"rank {rank.rank} of {rank.world_size}" if rank.world_size > 1 else None
        with tqdm(total=total, desc=name, unit="image", disable=None if rank.rank == 0 else True) as bar:
            samples, started, done = make_samples(ranges), time.monotonic(), 0
            for shard, numbers in zip(missing, ranges, strict=True):
                self._write(shard, _counted(itertools.islice(samples, len(numbers)), bar))
                done += len(numbers)
                if not sys.stderr.isatty():
                    _report(self.path(shard).name, name, done, total, time.monotonic() - started)

    def claim(self) -> bool:
        """Make the directory ours; True when it is complete already.

        Raises InputError, naming the difference, when it was begun with other settings.
        """
        found = self._stored()
        if found is None:
            try:
                with new_directory(self.directory) as scratch:
                    write_atomically(scratch / PARTIAL_FILE, metadata_bytes(self.metadata))
            except (InputError, OSError):
                if self._stored() is None:  # else another rank was faster
                    raise
            found = self._stored()
        assert found is not None, f"{self.directory} was just made"
        difference = next(_differences(found, json.loads(metadata_bytes(self.metadata))), None)
        if difference:
            name, before, now = difference
            raise InputError(f"{self.directory} was begun with {name} {before!r}, now it is {now!r}; repeat the first "
                             "command to go on, or choose another output directory")
        return (self.directory / METADATA_FILE).is_file()

    def _stored(self) -> dict | None:
        # The first rank may rename one to the other between two looks.
        for name in (METADATA_FILE, PARTIAL_FILE, METADATA_FILE):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return parse_json((self.directory / name).read_bytes(), self.directory / name,
                                  advice="remove the directory")
        return None

    def _is_complete(self, shard: int) -> bool:
        try:
            self._scan(shard)
        except FileNotFoundError:
            return False
        except InputError as error:
            logger.warning("%s; it is written again", error)
            return False
        return True

    def _scan(self, shard: int) -> list[Entry]:
        """The entries of a shard; InputError when it is damaged or does not hold its samples."""
        path = self.path(shard)
        entries = scan_tar(path, CODE_EXTENSIONS)
        size = encoded_size(self.metadata)
        if [(entry.key, entry.size) for entry in entries] != [(self.key(i), size) for i in self.numbers(shard)]:
            raise InputError(f"{path} does not hold the codes of its {len(self.numbers(shard))} images; remove it and "
                             "run the same command again")
        return entries

    def _write(self, shard: int, samples: Iterable[CodeSample]) -> None:
        with written_aside(self.path(shard)) as file:
            write_tar(code_records(self._checked(shard, samples), self.metadata), file, set())

    def _checked(self, shard: int, samples: Iterable[CodeSample]) -> Iterator[CodeSample]:
        for number, sample in zip(self.numbers(shard), samples, strict=True):
            assert sample.key == self.key(number)
            yield sample

    def _wait_for_all(self) -> None:
        seen, changed = None, time.monotonic()
        while missing := self._absent():
            now = self._sizes()
            if seen is None:
                logger.info("waiting for %d shards of other ranks", len(missing))
            if now != seen:
                seen, changed = now, time.monotonic()
            elif time.monotonic() - changed > PATIENCE:
                raise InputError(f"{self.directory} lacks {len(missing)} shards, {missing[0]} first, and nobody has "
                                 f"written for {PATIENCE:.0f} s; run the same command again")
            time.sleep(_POLL)

    def _absent(self) -> list[str]:
        # By listing: a file system may remember for a while that a single name was not there.
        there = set(os.listdir(self.directory))
        return [self.path(shard).name for shard in range(self.shards) if self.path(shard).name not in there]

    def _sizes(self) -> dict[str, int]:
        sizes = {}
        for entry in os.scandir(self.directory):
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                sizes[entry.name] = entry.stat().st_size
        return sizes

    def _finish(self) -> None:
        """Write the index, remove what killed processes left, and give the metadata its name: in this order."""
        bar = tqdm(range(self.shards), desc=f"indexing {self.directory}", unit="shard", disable=None)
        shards, columns = [], []
        for shard in bar:
            entries = self._scan(shard)
            shards.append(describe_shard(self.path(shard), entries))
            columns.append(columns_of(entries))
        write_index(self.directory, Contents(shards, self.classes, build_table(shards, columns)))
        for pattern in (".codes-*.tar.*", f".{INDEX_FILE}.*", f".{TABLE_FILE}.*", OWNER_FILE):
            for leftover in self.directory.glob(pattern):
                leftover.unlink()
        os.replace(self.directory / PARTIAL_FILE, self.directory / METADATA_FILE)


def _counted(samples: Iterable[CodeSample], bar: tqdm) -> Iterator[CodeSample]:
    for sample in samples:
        yield sample
        bar.update()


def _report(shard: str, rank: str | None, done: int, total: int, seconds: float) -> None:
    """One line for each shard where there is no terminal to draw a bar on."""
    left = seconds / done * (total - done)
    logger.info("%s%s written, %d of %d images, %.1f images/s, %s left", f"{rank}: " if rank else "", shard, done,
                total, done / seconds, tqdm.format_interval(left))


def _differences(before: dict, now: dict, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    """(dotted name, earlier value, present value) of everything that is not the same; None where it is lacking."""
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield prefix + name, old, new
