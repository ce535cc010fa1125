"""Square crops of the colour photographs that installed packages ship, as labelled PNG images."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from gigatok_ds.data.transforms import decode_image
from gigatok_ds.errors import InputError
from gigatok_ds.packing.shard_writer import Sample
from gigatok_ds.streams import numpy_stream

# Photographs in colour only: no drawings, no text, no phantoms. Of the stereo pair one half, because the other shows
# in its training part what the first shows in its validation part; not retina, whose right part is black.
PHOTOGRAPHS = {
    "astronaut": "skimage/data/astronaut.png",
    "chelsea": "skimage/data/chelsea.png",
    "china": "sklearn/datasets/images/china.jpg",
    "coffee": "skimage/data/coffee.png",
    "flower": "sklearn/datasets/images/flower.jpg",
    "grace_hopper": "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
    "hubble_deep_field": "skimage/data/hubble_deep_field.jpg",
    "ihc": "skimage/data/ihc.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "rocket": "skimage/data/rocket.jpg",
}
PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
CREDIT = """\
Those of scikit-image: astronaut, chelsea, coffee, hubble_deep_field, ihc, motorcycle and rocket (`skimage.data` names
their authors); of matplotlib: grace_hopper; of scikit-learn: china (danielbuechele) and flower (vultilion), both
CC BY 2.0, here cropped and reconstructed."""
SIZE = 96  # pixels of a stored crop; training crops windows of it once more
LEAST_SIDE = 64  # pixels of the photograph in the smallest crop
HELD_OUT = 0.2  # share of each photograph's width, at the right, that only validation sees


def find_photograph(name: str) -> Path:
    """The file of that photograph, without importing the package. Raises InputError when the package lacks it."""
    package, _, inside = PHOTOGRAPHS[name].partition("/")
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / inside if spec else None
    if path is None or not path.is_file():
        raise InputError(f"the photograph {PHOTOGRAPHS[name]} is not installed; pip install {PACKAGES[package]}")
    return path


def split_photograph(name: str) -> dict[str, Image.Image]:
    """The photograph's left part for training and its right part for validation; no pixel is in both."""
    path = find_photograph(name)
    image = decode_image(path.read_bytes(), path.name, orient=True)
    edge = round(image.width * (1 - HELD_OUT))
    return {"train": image.crop((0, 0, edge, image.height)),
            "validation": image.crop((edge, 0, image.width, image.height))}


def crops(split: str, count: int, seed: int) -> Iterator[Sample]:
    """`count` SIZE x SIZE crops of each photograph's part for `split`, photographs in turn; labels number PHOTOGRAPHS.

    The side of a crop is log-uniform from LEAST_SIDE to the shorter side of the part, its place uniform.
    """
    parts = [split_photograph(name)[split] for name in PHOTOGRAPHS]
    for number in range(count):
        for label, (name, part) in enumerate(zip(PHOTOGRAPHS, parts, strict=True)):
            crop = random_square(part, numpy_stream(seed, "photographs", split, name, number))
            yield Sample(key=f"{name}-{number:05d}", image_bytes=png(crop), extension="png", label=label)


def random_square(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    side = round(np.exp(rng.uniform(np.log(LEAST_SIDE), np.log(min(image.size)))))
    left, top = (int(rng.integers(length - side, endpoint=True)) for length in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png", compress_level=1)
    return buffer.getvalue()
