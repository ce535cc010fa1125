"""What is encoded of an image: its crops and mirror images."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageOps

from gigatok_ds.data.transforms import center_crop, random_crop, ten_crop
from gigatok_ds.errors import InputError
from gigatok_ds.streams import numpy_stream


@dataclass(frozen=True, kw_only=True)
class Views:
    """A function of an image and its number, giving `count` crops of side `size`; see `views_of` for the kinds, and
    `decode_image` for `orient`.
    """

    kind: str
    size: int
    count: int
    crop_scale: tuple[float, float]
    seed: int
    orient: bool = False

    def __call__(self, image: Image.Image, sample: int) -> list[Image.Image]:
        if self.kind == "ten-crop":
            return ten_crop(image, self.size)
        crop = center_crop(image, self.size)
        if self.kind == "flip":
            return [crop, ImageOps.mirror(crop)]
        streams = (numpy_stream(self.seed, "extract", sample, number) for number in range(1, self.count))
        return [crop, *(random_crop(image, self.size, self.crop_scale, rng=rng) for rng in streams)]

    def describe(self) -> dict:
        """What settles the crops, for a data set's provenance."""
        random = {"crop_scale": list(self.crop_scale), "crop_seed": self.seed} if self.kind == "random" else {}
        name = f"random-{self.count}" if self.kind == "random" else self.kind
        return {"crops": name, "image_size": self.size, "orient": self.orient} | random


def views_of(kind: str, size: int, *, crop_scale: tuple[float, float] = (0.8, 1.0), seed: int = 0,
             orient: bool = False) -> Views:
    """The views of that name.

    kind is "center", "flip" (the center crop and its mirror image), "ten-crop" (the original's: see
    `transforms.ten_crop`), or "random-N": the center crop and N - 1 random crops whose short side is at `crop_scale`
    of the image's, drawn from a stream of (seed, sample, crop). Raises InputError for another kind.
    """
    counts = {"center": 1, "flip": 2, "ten-crop": 10}
    name, _, number = kind.partition("-")
    if kind in counts:
        name, count = kind, counts[kind]
    elif name == "random" and number.isdecimal() and int(number) > 0:
        count = int(number)
    else:
        raise InputError(f"unknown crops {kind!r}; choose center, flip, ten-crop or random-N (e.g. random-8)")
    low, high = crop_scale
    return Views(kind=name, size=size, count=count, crop_scale=(low, high), seed=seed, orient=orient)
