"""The 1,797 handwritten digits of scikit-learn as labelled PNG images."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from gigatok_ds.errors import InputError
from gigatok_ds.streams import numpy_stream

if TYPE_CHECKING:
    from gigatok_ds.packing.shard_writer import Sample

CLASSES = [str(digit) for digit in range(10)]


def digits_splits(image_size: int = 32, test_fraction: float = 0.2,
                  seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    """(train, test) samples, image_size x image_size RGB PNGs, in the order of the data set.

    The same fraction of each class is held out, by a stream of `seed`, so a key is always in the same split.
    Raises InputError for a size below 1 or a fraction outside (0, 1).
    """
    from sklearn.datasets import load_digits

    from gigatok_ds.packing.shard_writer import Sample

    if image_size < 1:
        raise InputError(f"image size is {image_size}; it must be at least 1")
    if not 0 < test_fraction < 1:
        raise InputError(f"test fraction is {test_fraction}; it must be between 0 and 1")
    data = load_digits()
    held_out = hold_out(data.target, test_fraction, seed)
    samples = [
        Sample(key=f"digit-{number:04d}", image_bytes=_png(pixels, image_size), extension="png", label=label)
        for number, (pixels, label) in enumerate(zip(data.images, data.target.tolist(), strict=True))
    ]
    train = [sample for number, sample in enumerate(samples) if number not in held_out]
    return train, [samples[number] for number in sorted(held_out)]


def hold_out(labels: np.ndarray, fraction: float, seed: int = 0) -> set[int]:
    """Numbers of the samples of a test split: the same fraction of each class, but at least one and not all of it."""
    held_out = set()
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out |= set(numpy_stream(seed, "split", label).permutation(members)[:count].tolist())
    return held_out


def _png(pixels: np.ndarray, image_size: int) -> bytes:
    """Gray levels (8, 8) from 0 to 16, brought to 0 .. 255 and enlarged."""
    from PIL import Image

    small = Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8))
    large = small.resize((image_size, image_size), Image.Resampling.BICUBIC).convert("RGB")
    buffer = io.BytesIO()
    large.save(buffer, format="png")
    return buffer.getvalue()
