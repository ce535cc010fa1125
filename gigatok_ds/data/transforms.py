"""From encoded bytes to the network's input: decoding, crops, and the map to [-1, 1]."""

from __future__ import annotations

import functools
import io
import math
import struct
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from gigatok_ds.errors import InputError

MAX_PIXELS = 89_478_485  # 256 MiB of RGB, Pillow's own threshold for a decompression bomb
MAX_ASPECT_RATIO = 256  # a thinner image would grow to a huge one when its short side is enlarged
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")

Transform = Callable[[Image.Image, np.random.Generator], Tensor]


def open_image(data: bytes) -> Image.Image:
    """An image of the formats that are read, not decoded yet. Raises what Pillow raises."""
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode a JPEG, PNG, WebP or BMP into an upright 8-bit RGB image.

    Transparent pixels are laid over white, 16-bit gray keeps its upper eight bits (as Pillow does for 16-bit
    colour), EXIF orientation is applied. Raises InputError, naming the image, when it cannot be decoded to
    the last byte, is larger than MAX_PIXELS or thinner than MAX_ASPECT_RATIO.
    """
    try:
        image = open_image(data)
        _check_shape(image, name)
        image.load()
        return _to_rgb(_upright(image))
    except InputError:
        raise
    except Exception as error:  # decoders raise almost anything on malformed bytes
        reason = str(error) or type(error).__name__
        raise InputError(f"{name}: cannot decode this image ({reason}); replace or remove it") from None


def _check_shape(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: {width} x {height} pixels; at most {MAX_PIXELS} are decoded, shrink it")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputError(f"{name}: {width} x {height} pixels; sides may differ by a factor of at most "
                         f"{MAX_ASPECT_RATIO}, crop or remove it")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, TypeError, OSError, struct.error):
        return image  # unreadable metadata says nothing about orientation


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        # Pillow's own conversion clips at 255 instead of scaling.
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def resize_short_side(image: Image.Image, short_side: int) -> Image.Image:
    """Bicubic resize to the given short side, after halving large images with a box filter."""
    while min(image.size) >= 2 * short_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short_side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _window(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, scale: tuple[float, float] = (0.8, 1.0), *,
                rng: np.random.Generator) -> Image.Image:
    """A random size x size window of the image resized to a random short side.

    The short side is uniform over the integers from ceil(size / high) to ceil(size / low), both included, for
    scale = (low, high); the window is uniform over all places. Raises InputError unless 0 < low <= high <= 1.
    """
    low, high = scale
    if not 0 < low <= high <= 1:
        raise InputError(f"crop scale is {scale}; it must be 0 < low <= high <= 1")
    short_side = int(rng.integers(math.ceil(size / high), math.ceil(size / low), endpoint=True))
    image = resize_short_side(image, short_side)
    top = int(rng.integers(image.height - size, endpoint=True))
    left = int(rng.integers(image.width - size, endpoint=True))
    return _window(image, left, top, size)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle size x size window of the image resized to short side `size`."""
    image = resize_short_side(image, size)
    return _window(image, (image.width - size) // 2, (image.height - size) // 2, size)


def ten_crop(image: Image.Image, size: int, crop_range: float = 1.1) -> list[Image.Image]:
    """Ten size x size views of the center crop of side int(size * crop_range).

    Top left, top right, bottom left, bottom right, center, then the same five of the mirrored image. Raises
    InputError when crop_range is below 1.
    """
    if crop_range < 1:
        raise InputError(f"crop range is {crop_range}; it must be at least 1")
    image = center_crop(image, int(size * crop_range))
    far = image.width - size
    corners = [(0, 0), (far, 0), (0, far), (far, far), (round(far / 2), round(far / 2))]
    views = (image, ImageOps.mirror(image))
    return [_window(view, left, top, size) for view in views for left, top in corners]


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as float32 (3, H, W) in [-1, 1]."""
    return scale_pixels(torch.from_numpy(np.array(image, dtype=np.uint8)))


def scale_pixels(pixels: Tensor) -> Tensor:
    """RGB bytes (..., H, W, 3) as float32 (..., 3, H, W) in [-1, 1], the same numbers on every device."""
    # A tensor as divisor: CUDA multiplies by the rounded reciprocal of a plain number.
    divisor = torch.tensor(255.0, device=pixels.device)
    return pixels.movedim(-1, -3).contiguous().float().div_(divisor).sub_(0.5).div_(0.5)


def training_transform(size: int, crop_scale: tuple[float, float] = (0.8, 1.0),
                       flip: bool = True) -> Transform:
    """Random crop and, with probability one half if `flip`, a mirror image: (image, rng) -> float32 (3, size,
    size).
    """
    return functools.partial(_augment, size=size, crop_scale=crop_scale, flip=flip)


def _augment(image: Image.Image, rng: np.random.Generator, *, size: int, crop_scale: tuple[float, float],
             flip: bool) -> Tensor:
    image = random_crop(image, size, crop_scale, rng=rng)
    if flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return to_tensor(image)


def evaluation_transform(size: int) -> Transform:
    """Center crop: (image, rng) -> float32 (3, size, size); the generator is not used and may be None."""
    return functools.partial(_evaluate, size=size)


def _evaluate(image: Image.Image, rng: np.random.Generator | None = None, *, size: int) -> Tensor:
    return to_tensor(center_crop(image, size))
