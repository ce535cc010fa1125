"""Pictures to be encoded, and bytes that are damaged."""

import io

import numpy as np
from PIL import Image


def picture(width, height, mode="RGB", seed=0):
    """Smooth content (so that JPEG keeps it) with a different colour in each corner."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    phase = np.random.default_rng(seed).uniform(0, 0.2, 3)
    rgb = np.stack([x * 200 + 20, y * 200 + 20, 120 + 80 * np.sin(4 * (x + y))], axis=-1) + phase
    return Image.fromarray(rgb.astype(np.uint8)).convert(mode)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photograph(width, height, seed=0):
    """Smooth at several scales, with some noise, as photographs are."""
    rng = np.random.default_rng(seed)
    pixels = sum(np.asarray(Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC), np.float64) / weight for side, weight in ((4, 2), (17, 4), (90, 8)))
    return Image.fromarray((pixels + rng.normal(0, 2, pixels.shape)).clip(0, 255).astype(np.uint8))


def corrupted(data, rng):
    """Some bytes changed, cut off, left out, put in, repeated or overwritten; more often near the beginning."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(len(data) * rng.random() ** 3)
        length = int(rng.integers(1, 64))
        match int(rng.integers(7)):
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                data = data[: max(at, 1)]
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = rng.bytes(length)
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                data[at : at + length] = rng.bytes(len(data[at : at + length]))
            case 6:
                data[at : at + length] = [b"\0", b"\xff"][length % 2] * len(data[at : at + length])
        data = data or bytearray(b"\0")
    return bytes(data)
