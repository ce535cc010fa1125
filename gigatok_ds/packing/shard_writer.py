"""Writing images as a directory of shards."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from gigatok_ds.data.transforms import decode_whole_image
from gigatok_ds.errors import InputError
from gigatok_ds.shards.tar_scan import IMAGE_EXTENSIONS, is_safe_key
from gigatok_ds.shards.tar_writer import Record, ShardSet, new_directory, write_tars

MAX_KEY_BYTES = 90  # a ustar header has 100 bytes for KEY.extension
_CHECKED_AHEAD = 128  # images held in memory while they are checked in parallel


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An encoded image with its class number; `source` (a path, say) is what error messages call it."""

    key: str
    image_bytes: bytes
    extension: str
    label: int
    source: str | None = None


def write_shards(samples: Iterable[Sample], out_dir: str | Path, *, prefix: str,
                 samples_per_shard: int = 1000, classes: list[str], total: int | None = None) -> ShardSet:
    """Write images as WebDataset tars (KEY.jpg or the like, and KEY.cls) with an index, all of it or nothing.

    Every image is fully decoded first. `total` is for the progress bar. Raises InputError, naming the sample,
    for an undecodable image, a label without a class, an unknown extension or a bad key; and for an `out_dir`
    in use.
    """
    with new_directory(out_dir) as scratch, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        progress = tqdm(_checked(iter(samples), pool, len(classes)), total=total, unit="image", disable=None)
        shards = write_tars(progress, scratch, prefix=prefix, samples_per_shard=samples_per_shard,
                            extensions=IMAGE_EXTENSIONS, classes=classes)
    return ShardSet(directory=Path(out_dir), shards=shards, count=sum(shard.samples for shard in shards))


def _checked(samples: Iterator[Sample], pool: ThreadPoolExecutor, num_classes: int) -> Iterator[Record]:
    while group := list(itertools.islice(samples, _CHECKED_AHEAD)):
        yield from pool.map(lambda sample: _image_record(sample, num_classes), group)


def _image_record(sample: Sample, num_classes: int) -> Record:
    name = sample.source or sample.key
    if not is_safe_key(sample.key) or len(sample.key.encode()) > MAX_KEY_BYTES:
        raise InputError(f"sample key {sample.key!r} may hold only letters, digits and _ + = @ -, at most "
                         f"{MAX_KEY_BYTES} bytes")
    extension = sample.extension.lower()
    if extension not in IMAGE_EXTENSIONS:
        raise InputError(f"{name}: image extension {extension!r} is not one of {', '.join(IMAGE_EXTENSIONS)}")
    if not 0 <= sample.label < num_classes:
        raise InputError(f"{name}: label {sample.label} has no class; there are {num_classes}, from 0 on")
    decode_whole_image(sample.image_bytes, name)
    extension = "jpg" if extension == "jpeg" else extension
    return sample.key, {extension: sample.image_bytes, "cls": str(sample.label).encode()}
