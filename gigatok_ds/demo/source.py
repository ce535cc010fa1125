"""Where the demo's images come from: the digits that scikit-learn ships, or a directory of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gigatok_ds.data.folder import scan_image_folder
from gigatok_ds.demo.digits import CLASSES, digits_splits, hold_out
from gigatok_ds.errors import InputError
from gigatok_ds.packing.shard_writer import Sample


@dataclass(frozen=True, kw_only=True)
class DemoSource:
    """Two splits of labelled images; `has_targets` says whether the demo's published targets apply."""

    name: str
    description: str
    classes: list[str]
    train: Callable[[], Iterator[Sample]]
    test: Callable[[], Iterator[Sample]]
    has_targets: bool


def digits_source(image_size: int) -> DemoSource:
    train, test = digits_splits(image_size)
    return DemoSource(
        name="digits",
        description="1,797 real handwritten digits (UCI optical recognition of handwritten digits, from scikit-learn)",
        classes=CLASSES,
        train=lambda: iter(train),
        test=lambda: iter(test),
        has_targets=True,
    )


def folder_source(root: Path, test_fraction: float = 0.2) -> DemoSource:
    """An ImageFolder-style directory, split at random but reproducibly; every class is in both splits.

    Raises InputError when there are no images, or a class has fewer than two.
    """
    folder = scan_image_folder(root)
    for label, name in enumerate(folder.classes):
        if folder.labels.count(label) < 2:
            raise InputError(f"class {name!r} has a single image; every class needs at least 2 to be split")
    test = hold_out(np.array(folder.labels), test_fraction)
    chosen: dict[bool, list[tuple[int, Path, int]]] = {True: [], False: []}
    for number, (path, label) in enumerate(zip(folder.paths, folder.labels, strict=True)):
        chosen[number in test].append((number, path, label))

    def samples(held_out: bool) -> Iterator[Sample]:
        for number, path, label in chosen[held_out]:
            yield Sample(key=f"{number:08d}", image_bytes=path.read_bytes(), extension=path.suffix[1:].lower(),
                         label=label, source=str(path))

    return DemoSource(
        name="images",
        description=f"{len(folder.paths)} images of {len(folder.classes)} classes",
        classes=folder.classes,
        train=lambda: samples(False),
        test=lambda: samples(True),
        has_targets=False,
    )
