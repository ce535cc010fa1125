"""Checking image shards against their index, and saying what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gigatok_ds.data.transforms import decode_whole_image, open_image
from gigatok_ds.errors import InputError
from gigatok_ds.packing.workers import in_processes
from gigatok_ds.shards.class_labels import StoredLabels
from gigatok_ds.shards.contents import TarShard, describe_shard
from gigatok_ds.shards.remote import open_shards
from gigatok_ds.shards.shard_files import ShardFiles
from gigatok_ds.shards.tar_scan import NO_LABEL, Entry, in_words, scan_tar


@dataclass(kw_only=True)
class ShardReport:
    """What was found, in all shards or in one. `problems` names shard and sample; shorter sides (in pixels) and formats
    are those of decoded images.
    """

    classes: list[str] = field(default_factory=list)
    shards: int = 0
    size: int = 0  # bytes
    per_class: Counter = field(default_factory=Counter)
    short_sides: Counter = field(default_factory=Counter)
    formats: Counter = field(default_factory=Counter)
    # Of the tars: the data of samples, their labels, others by reason.
    members: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return self.per_class.total()

    def add(self, part: ShardReport) -> None:
        for name in ("shards", "size", "per_class", "short_sides", "formats", "members", "problems"):
            setattr(self, name, getattr(self, name) + getattr(part, name))

    def lines(self) -> Iterator[str]:
        """The summary for a person, without the problems."""
        counts = Counter({label: count for label, count in self.per_class.items() if label != NO_LABEL})
        unlabelled = self.samples - counts.total()
        kinds = [f"{counts.total()} images of {len(counts)} classes"] * bool(counts) + [
            f"{unlabelled} images without labels"] * bool(unlabelled)
        yield f"{' and '.join(kinds)} in {self.shards} shards, {self.size / 1e6:.1f} MB"
        yield f"{self.members.total()} members of tars: {in_words(self.members)}"
        if counts:
            few, many = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
            yield (f"labels {min(counts)} to {max(counts)}; {counts[few]} images ({self._class_name(few)}) to "
                   f"{counts[many]} ({self._class_name(many)}) in a class")
        if self.short_sides:
            sides, numbers = zip(*sorted(self.short_sides.items()), strict=True)
            yield f"shorter side {sides[0]} to {sides[-1]} pixels, median {int(np.median(np.repeat(sides, numbers)))}"
            yield ", ".join(f"{number} {name}" for name, number in self.formats.most_common())

    def _class_name(self, label: int) -> str:
        return self.classes[label] if 0 <= label < len(self.classes) else f"class {label}"


def check_shards(location: str | Path, *, decode: bool = True, workers: int = 0) -> ShardReport:
    """Compare every shard with the index (hash, samples, labels) and, with `decode`, decode every image.

    Tars without an index are indexed; of a URL, the copies in the cache are checked. `workers` processes share the
    shards (0: this one does it). Raises InputError when there is no readable index to compare with, or a local shard is
    missing or of another size.
    """
    index = open_shards(location, max_bad_fraction=1.0, compare=False)
    tasks = ((index.tars, shard, entries, index.classes, decode)
             for shard, entries in zip(index.shards, index.entries(), strict=True))
    report = ShardReport(classes=index.classes)
    with tqdm(total=len(index), unit="image", disable=None) as bar:
        for part in in_processes(_check_shard, tasks, workers):
            report.add(part)
            bar.update(part.samples)
    return report


def _check_shard(tars: ShardFiles, shard: TarShard, entries: list[Entry], classes: list[str],
                 decode: bool) -> ShardReport:
    report = ShardReport(shards=1, size=shard.size, per_class=Counter(entry.label for entry in entries))
    try:
        with tars.held(shard.name, shard) as path:
            _compare(path, shard, entries, classes, report)
            if decode:
                _look_at_all(path, entries, report)
    except InputError as error:
        report.problems.append(str(error))
    return report


def _compare(path: Path, shard: TarShard, entries: list[Entry], classes: list[str], report: ShardReport) -> None:
    labels = StoredLabels(classes) if classes else None
    found = scan_tar(path, problems=report.problems, tally=report.members, labels=labels)
    if describe_shard(path, found) != shard or found != entries:
        raise InputError(f"{path} is not what was indexed: its bytes have changed")


def _look_at_all(path: Path, entries: list[Entry], report: ShardReport) -> None:
    with open(path, "rb") as file:
        for entry in entries:
            if not entry.size:
                continue  # without data, which the scan has reported
            file.seek(entry.offset)
            _look(file.read(entry.size), f"{path}: sample {entry.key!r}", report)


def _look(data: bytes, name: str, report: ShardReport) -> None:
    try:
        report.short_sides[min(decode_whole_image(data, name).size)] += 1
    except InputError as error:
        report.problems.append(str(error))
        return
    with open_image(data) as image:
        report.formats[f"{image.format} {image.mode}"] += 1
