"""From a file that somebody uploaded to a picture, or to a sentence that says why not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gigatok_ds.data.transforms import MAX_PIXELS, decode_image, open_image
from gigatok_ds.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MEGABYTE, MEGAPIXEL = 2**20, 10**6  # the former as Gradio's own message counts


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of an upload: the file's megabytes and the picture's megapixels; and the megabytes of all files kept at
    a time. Raises InputError unless they are positive, the picture is one that `decode_image` decodes, and a file has
    room."""

    megabytes: float = 20
    megapixels: float = 50
    total_megabytes: float = 1000

    def __post_init__(self):
        if not self.megabytes > 0:
            raise InputError(f"--max-megabytes is {self.megabytes:g}; it must be above 0")
        if not 0 < self.megapixels * MEGAPIXEL <= MAX_PIXELS:
            raise InputError(f"--max-megapixels is {self.megapixels:g}; it must be above 0 and at most "
                             f"{MAX_PIXELS // MEGAPIXEL}, beyond which no image is decoded")

        if not self.megabytes <= self.total_megabytes < 10**9:
            raise InputError(f"--max-total-megabytes is {self.total_megabytes:g}; it must be at least --max-megabytes, "
                             f"which is {self.megabytes:g}")

    @property
    def total_bytes(self) -> int:
        return round(self.total_megabytes * MEGABYTE)

    @property
    def bytes(self) -> int:
        return round(self.megabytes * MEGABYTE)


def read_upload(path: Path, limits: Limits) -> Image.Image:
    """Decode an uploaded JPEG, PNG or WebP into an upright 8-bit RGB picture.

    Sizes are compared with the limits before anything is decoded: the file's by its length, the picture's by its
    header. Raises InputError, naming the file, when it is too large, of another format or damaged.
    """
    name, size = path.name, path.stat().st_size
    if size > limits.bytes:
        raise InputError(f"{name}: {size / MEGABYTE:.1f} MB; at most {limits.megabytes:g} MB are read")
    data = path.read_bytes()
    width, height = _size(data, name, limits)
    if width * height > limits.megapixels * MEGAPIXEL:
        raise InputError(f"{name}: {width} x {height} pixels, {width * height / MEGAPIXEL:.0f} megapixels; at most "
                         f"{limits.megapixels:g} are decoded, shrink it")
    return decode_image(data, name, orient=True)


def _size(data: bytes, name: str, limits: Limits) -> tuple[int, int]:
    """(width, height) by the header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the caller compares with stricter limits
            image = open_image(data)
    except Image.DecompressionBombError:
        raise InputError(
            f"{name}: more than {2 * MAX_PIXELS // MEGAPIXEL} megapixels; at most {limits.megapixels:g} are "
            "decoded, shrink it"
        ) from None
    except Exception:  # readers of headers raise almost anything on malformed bytes
        raise InputError(f"{name}: this is not an image that can be read; drop a JPEG, PNG or WebP file") from None
    if image.format not in FORMATS:
        raise InputError(f"{name}: this is a {image.format}; drop a JPEG, PNG or WebP file")
    return image.size
