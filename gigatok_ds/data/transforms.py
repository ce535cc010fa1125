"""From encoded bytes to the network's input: decoding, crops, and the map to [-1, 1]."""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from gigatok_ds.data.damage import damage_of
from gigatok_ds.errors import InputError

MAX_PIXELS = 89_478_485  # 256 MiB of RGB, Pillow's own threshold for a decompression bomb
MAX_ASPECT_RATIO = 256  # a thinner image would grow to a huge one when its short side is enlarged
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_UNREADABLE = (SyntaxError, ValueError, TypeError, OSError, struct.error)  # metadata, which then says nothing
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I"}  # EXIF's types, for struct
_TURNS: dict[object, Image.Transpose] = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}
_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")

def open_image(data: bytes) -> Image.Image:
    """An image of the formats that are read, not decoded yet. Raises what Pillow raises."""
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def decode_whole_image(data: bytes, name: str) -> Image.Image:
    """`decode_image` as the image is shown, which here also raises InputError for damage that its decoder passes over
    (`damage_of`)."""
    image = decode_image(data, name, orient=True)
    if damage := damage_of(data):
        raise InputError(f"{name}: cannot decode this image without a fault ({damage}); replace or remove it")
    return image


def decode_image(data: bytes, name: str, *, orient: bool = False) -> Image.Image:
    """Decode a JPEG, PNG, WebP or BMP into an 8-bit RGB image: the pixels of Pillow's convert("RGB"), as the original.

    orient: as a viewer shows it instead: EXIF orientation is applied, transparent pixels are laid over white, 16-bit
    gray keeps its upper eight bits (as Pillow does for 16-bit colour). Raises InputError, naming the image, when it
    cannot be decoded, as when its file ends too early, is larger than MAX_PIXELS or thinner than MAX_ASPECT_RATIO.
    """
    try:
        image = open_image(data)
        check_shape(*image.size, name)
        image.load()
        return _as_shown(_upright(image)) if orient else image.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # decoders raise almost anything on malformed bytes
        reason = str(error) or type(error).__name__
        raise InputError(f"{name}: cannot decode this image ({reason}); replace or remove it") from None


def check_shape(width: int, height: int, name: str) -> None:
    """InputError, naming the image, when it is larger than MAX_PIXELS or thinner than MAX_ASPECT_RATIO."""
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: {width} x {height} pixels; at most {MAX_PIXELS} are decoded, shrink it")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputError(f"{name}: {width} x {height} pixels; sides may differ by a factor of at most "
                         f"{MAX_ASPECT_RATIO}, crop or remove it")


def _upright(image: Image.Image) -> Image.Image:
    method = _TURNS.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> object:
    """What its metadata say of how it is to be turned, whatever else is in them; 1 if nothing."""
    exif = image.info.get("exif")
    tagged = _orientation_tag(exif.removeprefix(b"Exif\0\0")) if isinstance(exif, bytes) else None
    if tagged is not None:
        return tagged
    try:  # metadata of other kinds, such as XMP
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except _UNREADABLE:
        return 1


def _orientation_tag(tiff: bytes) -> int | None:
    """The value of that one tag in the first directory of EXIF data: other tags may be of types they should not be."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    found = None
    try:
        start, = struct.unpack_from(f"{order}I", tiff, 4)
        count, = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == ExifTags.Base.Orientation and kind in _WHOLE_NUMBERS:
                found, = struct.unpack_from(f"{order}{_WHOLE_NUMBERS[kind]}", tiff, entry + 8)
    except struct.error:
        pass
    return found


def _as_shown(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        # Pillow's own conversion clips at 255 instead of scaling.
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def resize_short_side(image: Image.Image, short_side: int) -> Image.Image:
    """Bicubic resize to the given short side, after halving large images with a box filter."""
    image = halved(image, short_side)
    return image.resize(_scaled_size(image.size, short_side), Image.Resampling.BICUBIC)


def halved(image: Image.Image, short_side: int) -> Image.Image:
    """The image with its sides halved, rounded down, by a box filter as often as leaves `short_side` of the shorter
    one.
    """
    while min(image.size) >= 2 * short_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _scaled_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    scale = short_side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def resized_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(width, height) of what `resize_short_side` makes of an image of this size."""
    while min(size) >= 2 * short_side:
        size = size[0] // 2, size[1] // 2
    return _scaled_size(size, short_side)


def resized_window(image: Image.Image, short_side: int, left: int, top: int, size: int) -> Image.Image:
    """A size x size window of `resize_short_side(image, short_side)`: the same bytes for less work.

    Pillow resizes each row by itself and then each column, so neither the rows that no pixel of the window is made of
    nor the columns beside it are needed. (With tall images version 13 begins with the columns.)
    """
    image = halved(image, short_side)
    width, height = _scaled_size(image.size, short_side)
    if image.height > 1.5 * image.width:
        return _window(image.resize((width, height), Image.Resampling.BICUBIC), left, top, size)
    step = image.height / height
    reach = 2 * max(step, 1) + 1  # of the bicubic filter, rounded up
    first, last = max(int(top * step - reach), 0), min(int((top + size) * step + reach) + 1, image.height)
    rows = image.crop((0, first, image.width, last)).resize((width, last - first), Image.Resampling.BICUBIC)
    columns = Image.new("RGB", (size, image.height))
    columns.paste(rows.crop((left, 0, left + size, last - first)), (0, first))
    return columns.resize((size, height), Image.Resampling.BICUBIC).crop((0, top, size, top + size))


def _window(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


class Crop(NamedTuple):
    """The window at (left, top) of an image resized to a short side, mirrored or not; in pixels."""

    short_side: int
    left: int
    top: int
    mirrored: bool = False


def draw_crop(image_size: tuple[int, int], size: int, scale: tuple[float, float], *, flip: bool = False,
              rng: np.random.Generator) -> Crop:
    """A random size x size window of an image (width, height); with `flip`, mirrored with probability one half.

    The short side is uniform over the integers from ceil(size / high) to ceil(size / low), both included, for
    scale = (low, high); the window is uniform over all places. Raises InputError unless 0 < low <= high <= 1.
    """
    low, high = scale
    if not 0 < low <= high <= 1:
        raise InputError(f"crop scale is {scale}; it must be 0 < low <= high <= 1")
    short_side = int(rng.integers(math.ceil(size / high), math.ceil(size / low), endpoint=True))
    width, height = resized_size(image_size, short_side)
    top = int(rng.integers(height - size, endpoint=True))
    left = int(rng.integers(width - size, endpoint=True))
    return Crop(short_side, left, top, flip and bool(rng.random() < 0.5))


def random_crop(image: Image.Image, size: int, scale: tuple[float, float] = (0.8, 1.0), *,
                rng: np.random.Generator) -> Image.Image:
    """A random size x size window of the image resized to a random short side, as `draw_crop` draws it."""
    crop = draw_crop(image.size, size, scale, rng=rng)
    return resized_window(image, crop.short_side, crop.left, crop.top, size)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle size x size window of the image resized to short side `size`."""
    width, height = resized_size(image.size, size)
    return resized_window(image, size, (width - size) // 2, (height - size) // 2, size)


def center_window(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle height x width window of the image resized so that it just covers it; `center_crop` of any shape."""
    scale = max(height / image.height, width / image.width)
    short = math.ceil(min(image.size) * scale - 1e-6)
    while any(side < wanted for side, wanted in zip(resized_size(image.size, short), (width, height), strict=True)):
        short += 1  # halving rounds sides down
    resized = resize_short_side(image, short)
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    return resized.crop((left, top, left + width, top + height))


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
    return scale_pixels(pixels_of(image))


def pixels_of(image: Image.Image) -> Tensor:
    """The bytes of an RGB image: uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def scale_pixels(pixels: Tensor) -> Tensor:
    """Bytes (B, ...) as float32 in [-1, 1], the same numbers on every device."""
    floats = torch.empty(pixels.shape, device=pixels.device)
    # A tensor as divisor: CUDA multiplies by the rounded reciprocal of a plain number.
    divisor = torch.full((), 255.0, device=pixels.device)
    one_by_one = pixels.device.type == "cpu"  # what is scaled stays in the cache
    for scaled, image in zip(floats, pixels, strict=True) if one_by_one else [(floats, pixels)]:
        torch.div(image, divisor, out=scaled).sub_(0.5).mul_(2)
    return floats


@dataclass(frozen=True)
class TrainingTransform:
    """Random crop and, with probability one half if `flip`, a mirror image: (image, rng) -> float32 (3, size, size).

    orient: see `decode_image`.
    """

    size: int
    crop_scale: tuple[float, float] = (0.8, 1.0)
    flip: bool = True
    orient: bool = False

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        return scale_pixels(self._pixels(image, rng))

    def decode(self, data: bytes, name: str, rng: np.random.Generator) -> Tensor:
        """The same of an encoded image, as bytes (3, size, size). Raises what `decode_image` raises."""
        return self._pixels(decode_image(data, name, orient=self.orient), rng)

    def draw(self, image_size: tuple[int, int], rng: np.random.Generator) -> Crop:
        """The crop of an image of this (width, height)."""
        return draw_crop(image_size, self.size, self.crop_scale, flip=self.flip, rng=rng)

    def _pixels(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        crop = self.draw(image.size, rng)
        image = resized_window(image, crop.short_side, crop.left, crop.top, self.size)
        return pixels_of(ImageOps.mirror(image) if crop.mirrored else image)
