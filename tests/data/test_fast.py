"""The fast decoding path: the crop of the exact one, nearly the same pixels, and the same verdict on bad data."""

import sys

import numpy as np
import pytest
import torch
from made_pictures import encode, photograph, picture
from PIL import Image

from gigatok_ds.data import fast
from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.transforms import decode_image, halved, resize_short_side
from gigatok_ds.errors import InputError

SIZE = 64
EXACT, FAST = (training_transform(SIZE, (0.5, 1.0), True, decoding) for decoding in ("exact", "fast"))
SHOWN = [training_transform(SIZE, (0.5, 1.0), True, decoding, orient=True) for decoding in ("exact", "fast")]


def both(data, seed=0, ways=(EXACT, FAST)):
    return [way.decode(data, "x", np.random.default_rng(seed)) for way in ways]


def psnr(first, second):
    return 10 * np.log10(255**2 / (first.double() - second.double()).square().mean().clamp(min=1e-9).item())


@pytest.mark.parametrize("size", [(100, 80), (97, 131), (127, 64), (90, 1000), (66, 65), (40, 30)])
@pytest.mark.parametrize("quality", [60, 95])
def test_whole_images_are_nearly_the_same(size, quality):
    for seed in range(10):
        exact, close = both(encode(photograph(*size, seed), "JPEG", quality=quality), seed)
        assert close.shape == exact.shape == (3, SIZE, SIZE) and close.dtype == torch.uint8
        assert psnr(exact, close) > 55
        assert psnr(exact, close.roll(1, 2)) < 40  # so far from a window one pixel beside it


def test_large_images_are_decoded_at_a_fraction(monkeypatch):
    sizes = []
    full = fast._decode

    def spy(data, size, short_side):
        pixels = full(data, size, short_side)
        sizes.append((pixels.shape[:2], short_side))
        return pixels

    monkeypatch.setattr(fast, "_decode", spy)
    for seed in range(10):
        exact, close = both(encode(photograph(700, 520, seed), "JPEG", quality=90), seed)
        (height, width), short_side = sizes[-1]
        assert width <= 350 and short_side <= min(height, width)
        assert psnr(exact, close) > 32
        assert psnr(exact, close.roll(1, 2)) < psnr(exact, close)  # and not displaced by a pixel


@pytest.mark.parametrize("size", [256, *(pytest.param(size, marks=pytest.mark.slow) for size in (192, 128)), 64])
def test_images_of_every_size_stay_where_they_are_at_every_scale(size):
    """libjpeg's scaled image has ceil(side * k / 8) columns, which may stand for more than the image."""
    exact, close = (training_transform(size, (1.0, 1.0), False, decoding) for decoding in ("exact", "fast"))
    full, found = photograph(600, 600), {}
    for side in range(512, 601):
        data = encode(full.crop((0, 0, side, side)), "JPEG", quality=92)
        found[side] = psnr(*(way.decode(data, "x", np.random.default_rng(0)) for way in (exact, close)))
    multiples = min(value for side, value in found.items() if side % 8 == 0)
    assert multiples > 43 and min(found.values()) > multiples - 3, min(found, key=found.get)


def test_large_images_of_other_formats_are_halved_as_in_the_exact_way():
    for size in ((700, 520), (701, 521), (1031, 640)):
        assert psnr(*both(encode(photograph(*size), "PNG"))) > 55


@pytest.mark.parametrize("kind, mode, options", [
    ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "L", {}), ("WEBP", "RGB", {"lossless": True}), ("BMP", "RGB", {}),
    ("JPEG", "CMYK", {}), ("JPEG", "L", {})])
def test_other_kinds_are_decoded_exactly_and_resized_fast(kind, mode, options):
    exact, close = both(encode(photograph(120, 90).convert(mode), kind, **options))
    assert psnr(exact, close) > 55


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images_are_turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data, plain = encode(photograph(120, 70), "JPEG", exif=exif), both(encode(photograph(120, 70), "JPEG"))
    assert all(map(torch.equal, both(data), plain))
    exact, close = both(data, ways=SHOWN)
    assert psnr(exact, close) > 55
    assert (orientation == 1) == torch.equal(exact, plain[0])


def test_metadata_of_other_programs_is_left_to_the_exact_decoder():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    exact, close = both(encode(photograph(120, 70), "JPEG", xmp=xmp), ways=SHOWN)
    assert psnr(exact, close) > 55 and not torch.equal(exact, both(encode(photograph(120, 70), "JPEG"))[0])


def test_bad_images_are_refused_in_the_same_words():
    data = encode(photograph(90, 80), "JPEG")
    bomb = bytearray(data)
    frame = data.index(b"\xff\xc0")
    bomb[frame + 5 : frame + 9] = b"\xff\xf0\xff\xf0"
    for bad in (data[: len(data) // 2], b"nothing", bytes(bomb), encode(picture(600, 2), "JPEG")):
        said = []
        for way in (EXACT, FAST):
            with pytest.raises(InputError) as caught:
                way.decode(bad, "image 7", np.random.default_rng(0))
            said.append(str(caught.value))
        assert said[0] == said[1] and "image 7" in said[0]


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (301, 300), (300, 301), (299, 299), (1000, 130), (130, 1000)])
def test_only_what_the_window_needs_is_resized(size):
    """The window of the resized part is the window of the resized whole, but for rounding."""
    for seed in range(20):
        image, rng = photograph(*size, seed), np.random.default_rng(seed)
        crop = FAST.draw(image.size, rng)
        pixels = np.array(image)
        found = fast._window(pixels, image.size, crop._replace(mirrored=False), SIZE).int()
        full = torch.nn.functional.interpolate(
            torch.from_numpy(np.array(halved(image, crop.short_side))).permute(2, 0, 1)[None], mode="bicubic",
            antialias=True, size=resize_short_side(image, crop.short_side).size[::-1])[0].int()
        expected = full[:, crop.top : crop.top + SIZE, crop.left : crop.left + SIZE]
        assert (found - expected).abs().max() <= 2
        assert torch.equal(fast._window(pixels, image.size, crop._replace(mirrored=True), SIZE).int(), found.flip(2))


def test_without_simplejpeg_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    monkeypatch.delitem(sys.modules, "gigatok_ds.data.fast")
    with pytest.raises(InputError, match="pip install simplejpeg"):
        training_transform(SIZE, decoding="fast")
    assert decode_image(encode(picture(9, 9), "JPEG"), "x").size == (9, 9)
