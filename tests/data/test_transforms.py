"""Decoding of every kind of image, and crops against plain recomputations."""

import io
import math
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_pictures import encode, picture
from PIL import Image

from gigatok_ds.data import transforms
from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.transforms import (
    center_crop,
    center_window,
    decode_image,
    draw_crop,
    pixels_of,
    random_crop,
    resize_short_side,
    resized_size,
    resized_window,
    scale_pixels,
    ten_crop,
    to_tensor,
)
from gigatok_ds.errors import InputError

EXIF_ODDITIES = {  # tags beside Orientation, of types that they should not have: (tag, type, count, value)
    "Software as a fraction": (0x131, 5, 1, None), "Make as a double": (0x10F, 12, 1, None),
    "a description beyond the end": (0x10E, 2, 4000, b"\xa0\xbb\x0d\0"),
    "XResolution as text": (0x11A, 2, 4, b"72\0\0"),
    "an unknown type": (0x131, 99, 1, None), "a directory that is not there": (0x8769, 4, 1, b"\x3f\x42\x0f\0"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("odd", EXIF_ODDITIES.values(), ids=EXIF_ODDITIES)
def test_odd_tags_beside_the_orientation_change_nothing(odd, orientation):
    entries = [odd, (0x112, 3, 1, struct.pack("<HH", orientation, 0))]
    behind = struct.pack("<I", 8 + 2 + 12 * len(entries) + 4)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(
        struct.pack("<HHI", *entry[:3]) + (entry[3] or behind) for entry
        in sorted(entries)) + struct.pack("<I", 0) + bytes(16)
    plain = Image.Exif()
    plain[0x112] = orientation
    found, expected = (decode_image(encode(picture(40, 20), "JPEG", exif=data), "x", orient=True)
                       for data in (exif, plain))
    assert found.size == ((20, 40) if orientation > 4 else (40, 20)) and found.tobytes() == expected.tobytes()


def assert_close(image, reference, tolerance):
    assert image.mode == "RGB" and image.size == reference.size
    difference = np.abs(np.asarray(image, np.int32) - np.asarray(reference, np.int32))
    assert difference.max() <= tolerance, difference.max()


@pytest.mark.parametrize("kind, options, tolerance", [
    ("PNG", {}, 0), ("BMP", {}, 0), ("WEBP", {"lossless": True}, 0),
    ("JPEG", {"quality": 95, "subsampling": 0}, 12)])
def test_plain_formats(kind, options, tolerance):
    reference = picture(40, 30)
    assert_close(decode_image(encode(reference, kind, **options), "x"), reference, tolerance)


@pytest.mark.parametrize("mode, kind", [
    ("L", "PNG"), ("L", "JPEG"), ("1", "PNG"), ("P", "PNG"), ("P", "BMP")])
def test_gray_and_palette(mode, kind):
    source = picture(40, 30, mode)
    image = decode_image(encode(source, kind), "x")
    assert_close(image, source.convert("RGB"), 8)  # 8 of 255 for JPEG's rounding, exact for the others
    if mode in ("L", "1"):
        pixels = np.asarray(image)
        assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()


def test_cmyk_jpeg():
    reference = picture(48, 48)
    image = decode_image(encode(reference.convert("CMYK"), "JPEG", quality=95), "x")
    assert_close(image, reference, 24)  # JPEG, and the rounding of two colour conversions


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(mode):
    source = picture(40, 30).convert("L").convert(mode) if mode == "LA" else picture(40, 30).convert(mode)
    alpha = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1))
    source.putalpha(Image.fromarray(alpha))
    image = decode_image(encode(source, "PNG"), "x", orient=True)
    weight = alpha[..., None] / 255
    expected = np.asarray(source.convert("RGBA"))[..., :3] * weight + 255 * (1 - weight)
    assert np.abs(np.asarray(image) - expected).max() <= 1.5  # fixed-point compositing
    assert (np.asarray(image)[:, 0] == 255).all()


def test_transparent_palette_colour():
    source = Image.new("P", (8, 4), 1)
    source.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    source.putpixel((0, 0), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode_image(encode(source, "PNG", transparency=0), "x", orient=True)
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((1, 0)) == (0, 0, 255)


def test_sixteen_bit_gray_keeps_its_upper_bits():
    values = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    image = decode_image(encode(Image.fromarray(values), "PNG"), "x", orient=True)
    assert image.mode == "RGB"
    assert (np.asarray(image) == (values >> 8)[..., None]).all()


def png(width, height, bit_depth, colour_type, raw, *extra):
    """A PNG by hand, for kinds that Pillow cannot write: `extra` chunks go before the pixels."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bit_depth, colour_type, 0, 0, 0])
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    parts = [len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
             for name, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_sixteen_bit_colour():
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    image = decode_image(png(7, 5, 16, 2, rows), "x")
    assert np.abs(np.asarray(image, int) - (values >> 8).astype(int)).max() <= 1


@pytest.mark.parametrize("orientation, turn", [
    (1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]), (4, lambda a: a[::-1]),
    (5, lambda a: a.swapaxes(0, 1)), (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)), (8, lambda a: np.rot90(a, 1))])
@pytest.mark.parametrize("mode", ["RGB", "I;16", "RGBA"])
def test_exif_orientation(orientation, turn, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    if mode == "I;16":
        stored = Image.fromarray((np.arange(40 * 30).reshape(30, 40) * 50).astype(np.uint16))
        plain = np.repeat((np.asarray(stored) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    else:
        stored = picture(40, 30, mode)
        plain = np.asarray(stored.convert("RGB"))
    assert (np.asarray(decode_image(encode(stored, "PNG", exif=exif), "x", orient=True)) == turn(plain)).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"II*\0\xff\xff\xff\x7f", b"no such header"])
def test_damaged_exif_does_not_reject_an_image(exif):
    data = encode(picture(40, 30), "JPEG", quality=95, exif=b"Exif\0\0" + exif)
    assert decode_image(data, "x", orient=True).size == (40, 30)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_cut_off_image_is_refused_by_name(kind):
    data = encode(picture(64, 64), kind)
    for length in (0, 1, 10, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(InputError, match="photo 17"):
            decode_image(data[:length], "photo 17")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cut_off_image_with_an_orientation_is_refused(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture(64, 64), kind, exif=exif)
    assert decode_image(data, "photo 17").size == (64, 64)
    with pytest.raises(InputError, match="photo 17"):
        decode_image(data[: len(data) * 3 // 4], "photo 17")


def test_noise_and_other_formats_are_refused():
    for data in (b"not an image at all", np.random.default_rng(0).bytes(5000), encode(picture(8, 8), "GIF"),
                 encode(picture(8, 8), "TIFF")):
        with pytest.raises(InputError, match="photo 17"):
            decode_image(data, "photo 17")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_before_decoding():
    # Between Pillow's warning and its error; beyond both; absurd.
    for side, reason in ((10_000, "at most 89478485 are decoded"), (30_000, "exceeds limit"),
                         (2**31 - 1, "exceeds limit")):
        with pytest.raises(InputError, match=f"photo 17: .*{reason}"):
            decode_image(png(side, side, 8, 2, b"\0"), "photo 17")
    with pytest.raises(InputError, match="factor of at most 256"):
        decode_image(encode(Image.new("RGB", (2000, 5)), "PNG"), "photo 17")


class Recorder:
    """A generator that notes what is asked of it."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.drawn = []

    def integers(self, low, high=None, *, endpoint):
        assert endpoint
        low, high = (0, low) if high is None else (low, high)
        value = int(self.rng.integers(low, high, endpoint=True))
        self.drawn.append((low, high, value))
        return value


def resized(image, short):
    """Section 8's resize, spelled out: halve while at least twice too large, then bicubic."""
    width, height = image.size
    while min(width, height) >= short * 2:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    upright = width <= height
    target = (short, round(height * (short / width))) if upright else (round(width * (short / height)), short)
    return np.asarray(image.resize(target, Image.Resampling.BICUBIC))


SHAPES = [(64, 64), (100, 70), (70, 300), (40, 33), (500, 411), (17, 90), (129, 128), (12, 12)]


@pytest.mark.parametrize("shape", SHAPES)
def test_center_crop(shape):
    image, size = picture(*shape), 32
    full = resized(image, size)
    top, left = (full.shape[0] - size) // 2, (full.shape[1] - size) // 2
    assert (np.asarray(center_crop(image, size)) == full[top : top + size, left : left + size]).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [(0.8, 1.0), (0.5, 0.7), (1.0, 1.0)])
def test_random_crop(shape, scale):
    image, size = picture(*shape), 32
    for seed in range(5):
        recorder = Recorder(seed)
        crop = np.asarray(random_crop(image, size, scale, rng=recorder))
        (low, high, short), (zero_top, max_top, top), (zero_left, max_left, left) = recorder.drawn
        assert (low, high) == (math.ceil(size / scale[1]), math.ceil(size / scale[0]))
        full = resized(image, short)
        assert (zero_top, max_top) == (0, full.shape[0] - size)
        assert (zero_left, max_left) == (0, full.shape[1] - size)
        assert crop.shape == (size, size, 3)
        assert (crop == full[top : top + size, left : left + size]).all()


def test_random_crop_reaches_both_ends_of_its_range():
    image, seen = picture(300, 300), set()
    for seed in range(400):
        recorder = Recorder(seed)
        random_crop(image, 8, (0.8, 1.0), rng=recorder)
        seen.add(recorder.drawn[0][2])
    assert seen == {8, 9, 10}


def test_the_range_of_the_published_recipe():
    recorder = Recorder(0)
    random_crop(picture(400, 300), 256, rng=recorder)
    assert recorder.drawn[0][:2] == (256, 320)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.9, 0.8), (0.5, 1.2), (-0.5, 0.5)])
def test_bad_crop_scale(scale):
    with pytest.raises(InputError, match="0 < low <= high <= 1"):
        random_crop(picture(64, 64), 32, scale, rng=np.random.default_rng(0))


def test_ten_crop():
    image = picture(400, 330)
    middle = np.asarray(center_crop(image, 281))
    views = [np.asarray(view) for view in ten_crop(image, 256)]
    assert len(views) == 10
    for base, half in ((middle, views[:5]), (middle[:, ::-1], views[5:])):
        expected = [base[:256, :256], base[:256, 25:], base[25:, :256], base[25:, 25:], base[12:268, 12:268]]
        assert all((view == reference).all() for view, reference in zip(half, expected, strict=True))
    with pytest.raises(InputError, match="at least 1"):
        ten_crop(image, 256, 0.9)


def test_to_tensor_maps_bytes_to_minus_one_to_one():
    image = picture(20, 10)
    tensor = to_tensor(image)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 10, 20) and tensor.is_contiguous()
    expected = np.asarray(image, np.float64).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(tensor.numpy() - expected).max() < 2e-7  # fp32 rounding
    ends = to_tensor(Image.fromarray(np.array([[[0, 255, 0]]], np.uint8)))
    assert ends.flatten().tolist() == [-1.0, 1.0, -1.0]


def test_training_transform_is_a_function_of_its_stream():
    image = picture(100, 80)
    transform = training_transform(32, (0.8, 1.0), True)
    views, again = ([transform(image, np.random.default_rng(seed)) for seed in range(40)] for _ in range(2))
    assert torch.equal(torch.stack(views), torch.stack(again))
    # The picture brightens to the right in red, so a mirrored view darkens.
    mirrored = [bool(view[0, :, 0].mean() > view[0, :, -1].mean()) for view in views]
    assert 8 <= sum(mirrored) <= 32  # 40 fair coins leave this range with probability below 1e-4
    unflipped = training_transform(32, (0.8, 1.0), False)
    assert all(view[0, :, 0].mean() < view[0, :, -1].mean()
               for view in (unflipped(image, np.random.default_rng(seed)) for seed in range(20)))


def test_limits_are_pillows():
    assert transforms.MAX_PIXELS == Image.MAX_IMAGE_PIXELS


@settings(max_examples=300, deadline=None)
@given(width=st.integers(2, 250), height=st.integers(2, 250), size=st.integers(2, 48), seed=st.integers(0, 2**32),
       low=st.floats(0.3, 1.0))
def test_a_window_costs_less_and_has_the_same_bytes(width, height, size, seed, low):
    assume(max(width, height) <= 20 * min(width, height))
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    crop = draw_crop(image.size, size, (low, 1.0), rng=rng)
    full = resize_short_side(image, crop.short_side)
    assert full.size == resized_size(image.size, crop.short_side)
    window = full.crop((crop.left, crop.top, crop.left + size, crop.top + size))
    assert resized_window(image, crop.short_side, crop.left, crop.top, size).tobytes() == window.tobytes()


class Scripted:
    """A generator whose draws are given."""

    def __init__(self, short, top, left, mirrored):
        draws = iter((short, top, left))
        self.random = lambda: 0.1 if mirrored else 0.9
        self.integers = lambda *bounds, **options: next(draws)


@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (257, 256), (1300, 900), (200, 640)])
def test_training_input_is_the_originals_bit_for_bit(shape):
    """Section 8's transforms by torchvision's own, with the same draws, on a file that is read from its bytes."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    size, data = 256, encode(picture(*shape), "JPEG", quality=90)
    for seed in range(6):
        draws = random.Random(seed)
        with Image.open(io.BytesIO(data)) as file:
            image = file.convert("RGB")
        short = draws.randint(256, 320)
        full = Image.fromarray(resized(image, short))
        top, left = draws.randint(0, full.height - size), draws.randint(0, full.width - size)
        mirrored = draws.random() < 0.5
        window = full.crop((left, top, left + size, top + size))
        tensor = functional.to_tensor(functional.hflip(window) if mirrored else window)
        theirs = functional.normalize(tensor, [0.5] * 3, [0.5] * 3)
        transform = training_transform(size)
        bytes_ = transform.decode(data, "x", Scripted(short, top, left, mirrored))
        assert torch.equal(scale_pixels(bytes_[None])[0], theirs)
        assert torch.equal(transform(decode_image(data, "x"), Scripted(short, top, left, mirrored)), theirs)


KINDS = [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "1"), ("PNG", "P"),
         ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "I;16"), ("WEBP", "RGB"), ("WEBP", "RGBA"), ("BMP", "RGB"),
         ("BMP", "P")]


def any_picture(number):
    """An encoded image: kinds, orientations and ways of storing in turn, of any size."""
    draws = np.random.default_rng(number)
    kind, mode = KINDS[number % len(KINDS)]
    size = [int(side) for side in draws.integers(20, 90, 2)]
    options = {}
    if mode == "I;16":
        image = Image.fromarray(draws.integers(0, 65536, (size[1], size[0]), dtype=np.uint16))
    else:
        image = picture(*size).convert("L" if mode == "LA" else "RGB").convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(draws.integers(0, 256, (size[1], size[0]), dtype=np.uint8)))
    if mode == "P" and kind == "PNG" and number % 3:
        options["transparency"] = int(draws.integers(4))
    if kind == "JPEG":
        options |= {"progressive": bool(number % 2), "quality": int(draws.integers(40, 100)),
                    "subsampling": int(draws.integers(3))}
    if kind != "BMP":
        exif = Image.Exif()
        exif[0x112] = number // len(KINDS) % 9  # 0 is none of them
        options["exif"] = exif
    data = encode(image, kind, **options)
    return data[: len(data) * 9 // 10] if number % 25 == 24 else data


@pytest.mark.filterwarnings("ignore")
def test_a_thousand_images_are_what_the_originals_loader_makes_of_them():
    """Image.open(f).convert("RGB") and section 8's crops; what that cannot decode is refused."""
    refused = 0
    for number in range(1000):
        data, draws = any_picture(number), random.Random(number)
        try:
            with Image.open(io.BytesIO(data)) as file:
                image = file.convert("RGB")
        except OSError:
            refused += 1
            with pytest.raises(InputError, match=f"image {number}: cannot decode"):
                decode_image(data, f"image {number}")
            continue
        short = draws.randint(32, 40)
        full = Image.fromarray(resized(image, short))
        top, left = draws.randint(0, full.height - 32), draws.randint(0, full.width - 32)
        window = np.asarray(full.crop((left, top, left + 32, top + 32)))
        mirrored = draws.random() < 0.5
        ours = training_transform(32).decode(data, "x", Scripted(short, top, left, mirrored))
        theirs = window[:, ::-1] if mirrored else window
        assert (ours.permute(1, 2, 0).numpy() == theirs).all(), number
    assert 20 < refused < 60


def test_scaling_is_torchvisions_for_every_byte():
    functional = pytest.importorskip("torchvision.transforms.functional")
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    theirs = functional.normalize(functional.to_tensor(ramp), [0.5] * 3, [0.5] * 3)
    assert torch.equal(to_tensor(ramp), theirs) and torch.equal(scale_pixels(pixels_of(ramp)[None])[0], theirs)


@pytest.mark.parametrize("size", [(1547, 1128), (1128, 1547), (500, 375), (40, 3000), (24, 16), (767, 511),
                                  (5000, 4999)])
@pytest.mark.parametrize("shape", [(256, 384), (384, 256), (256, 256), (64, 512)])
def test_a_window_of_any_shape_lies_in_the_image(size, shape):
    """A bright image has no dark border, whichever way its sides were rounded."""
    window = center_window(Image.new("RGB", size, (200, 200, 200)), *shape)
    assert window.size == shape[::-1] and np.asarray(window).min() == 200


def test_a_square_window_is_the_center_crop():
    image = picture(900, 640)
    assert center_window(image, 256, 256).tobytes() == center_crop(image, 256).tobytes()
