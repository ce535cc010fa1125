"""The fast way from a JPEG to a training crop: the same window, with small differences in its pixels.

libjpeg-turbo decodes images that are at least twice too large at a fraction of their size, with its faster integer
transform and without smoothing chroma; torch's kernel for bytes resizes them. docs/data.md has the differences.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gigatok_ds.data.transforms import (
    Crop,
    TrainingTransform,
    check_shape,
    decode_image,
    is_upright,
    open_image,
    resized_size,
)


class FastTransform(TrainingTransform):
    """TrainingTransform, but `decode` makes the same crop from fewer operations."""

    def decode(self, data: bytes, name: str, rng: np.random.Generator) -> Tensor:
        """A training crop of an encoded image, as bytes (size, size, 3). Raises what `decode_image` raises."""
        size = _size_of_plain_jpeg(data, name)
        if size is not None:
            crop = self.draw(size, rng)
            pixels = _decode(data, crop.short_side)
            if pixels is not None:
                return _window(pixels, size, crop, self.size)
        image = decode_image(data, name)
        crop = crop if image.size == size else self.draw(image.size, rng)
        return _window(np.array(image), image.size, crop, self.size)


def _size_of_plain_jpeg(data: bytes, name: str) -> tuple[int, int] | None:
    """(width, height) of an upright gray or YCbCr JPEG; None for everything else."""
    try:
        with open_image(data) as image:
            check_shape(image, name)
            plain = image.format == "JPEG" and image.mode in ("RGB", "L") and is_upright(image)
            return image.size if plain else None
    except Exception:  # the other decoder says what is wrong with it
        return None


def _decode(data: bytes, short_side: int) -> np.ndarray | None:
    """RGB bytes (H, W, 3), at 1/2 or less where that leaves `short_side` pixels; None if the data is damaged."""
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True, min_height=short_side,
                                      min_width=short_side, min_factor=2)
    except ValueError:
        return None


def _window(pixels: np.ndarray, image_size: tuple[int, int], crop: Crop, size: int) -> Tensor:
    width, height = resized_size(image_size, crop.short_side)
    channels_last = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = F.interpolate(channels_last, size=(height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    window = resized[crop.top : crop.top + size, crop.left : crop.left + size]
    return window.flip(1) if crop.mirrored else window.contiguous()
