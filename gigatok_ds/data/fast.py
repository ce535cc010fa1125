"""The fast way from a JPEG to a training crop: the same window, with small differences in its pixels.

libjpeg-turbo decodes images that are at least twice too large at 1/2, 1/4 or 1/8 of their size where both sides can be
divided by as much, which takes the place of as many halvings, and torch's kernel for bytes resizes what is left of
them. docs/data.md has the differences.
"""

from __future__ import annotations

import math

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gigatok_ds.data.transforms import (
    Crop,
    TrainingTransform,
    check_shape,
    decode_image,
    halved,
    resized_size,
)

_METADATA, _START_OF_SCAN = 0xE1, 0xDA  # JPEG markers: APP1 and SOS
_SMALLEST = 8  # the decoder's smallest fraction is one of this
_UP = 1 + 1e-9


class FastTransform(TrainingTransform):
    """TrainingTransform, but `decode` makes the same crop from fewer operations."""

    def decode(self, data: bytes, name: str, rng: np.random.Generator) -> Tensor:
        """A training crop of an encoded image, as bytes (3, size, size). Raises what `decode_image` raises."""
        size = _size_of_plain_jpeg(data, upright=not self.orient)
        if size is not None:
            crop = self.draw(size, rng)
            pixels = _decode(data, size, crop.short_side)
            if pixels is not None:
                return _window(pixels, size, crop, self.size)
        image = decode_image(data, name, orient=self.orient)
        crop = crop if image.size == size else self.draw(image.size, rng)
        return _window(np.array(image), image.size, crop, self.size)


def _size_of_plain_jpeg(data: bytes, *, upright: bool) -> tuple[int, int] | None:
    """(width, height) of a gray or YCbCr JPEG that is upright, or has no metadata that could turn it; None for
    everything else.
    """
    if not data.startswith(b"\xff\xd8") or (not upright and _has_metadata(data)):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        check_shape(width, height, "")
    except ValueError:
        return None
    return (width, height) if colours in ("YCbCr", "Gray") else None


def _has_metadata(data: bytes) -> bool:
    """Whether a JPEG holds EXIF or XMP before its pixels; also of what cannot be told."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == _START_OF_SCAN:
            return False
        if marker == _METADATA:
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def _decode(data: bytes, size: tuple[int, int], short_side: int) -> np.ndarray | None:
    """RGB bytes (H, W, 3) of an image of `size` (width, height), halved as often as the decoder can; None if it is
    damaged.

    Only whole pixels: of a side that does not divide, the decoder's last pixel stands for more than the image, and an
    odd side is halved (`resize_short_side`) by other pairs behind its middle than before it.
    """
    (width, height), times = size, 1
    while (
        2 * times <= _SMALLEST
        and min(size) >= 2 * times * short_side
        and width % (2 * times) == height % (2 * times) == 0
    ):
        times *= 2
    try:
        return simplejpeg.decode_jpeg(data, min_height=height // times, min_width=width // times)
    except ValueError:
        return None


def _window(pixels: np.ndarray, image_size: tuple[int, int], crop: Crop, size: int) -> Tensor:
    """The crop of an image of `image_size` (width, height), of which `pixels` (H, W, 3) may have been halved already.
    """
    width, height = resized_size(image_size, crop.short_side)
    if min(pixels.shape[:2]) >= 2 * crop.short_side:
        pixels = np.array(halved(Image.fromarray(pixels), crop.short_side))
    rows, columns = pixels.shape[:2]
    part = pixels[: _needed(rows, height, crop.top + size), : _needed(columns, width, crop.left + size)]
    # Rounded up, so that a whole side becomes as long as it should.
    factors = height / rows * _UP, width / columns * _UP
    channels_last = torch.from_numpy(part).permute(2, 0, 1)[None]
    resized = F.interpolate(channels_last, scale_factor=factors, mode="bicubic", antialias=True)[0]
    window = resized[:, crop.top : crop.top + size, crop.left : crop.left + size]
    return window.flip(2) if crop.mirrored else window


def _needed(length: int, resized: int, end: int) -> int:
    """How many of the pixels along a side the first `end` of the resized ones are made of."""
    if resized >= length:
        return length
    reach = 3  # of the bicubic filter, in resized pixels
    return min(length, math.ceil((end + reach) * length / resized))
