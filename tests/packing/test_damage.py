"""Damage that decoders pass over is found when images are packed and checked; good images of every kind pass."""

import io
import itertools
import struct
import sys
import zlib

import numpy as np
import pytest
from made_pictures import encode, photograph
from PIL import Image
from small_shards import make_images, plain_tar

from gigatok_ds.data.damage import damage_of
from gigatok_ds.data.transforms import decode_image
from gigatok_ds.errors import InputError
from gigatok_ds.packing.checking import check_shards
from gigatok_ds.packing.image_sources import open_source
from gigatok_ds.packing.pack_shards import Packing, pack

PHOTOGRAPH = photograph(120, 90)
JPEG, PROGRESSIVE, PNG = (encode(PHOTOGRAPH, *kind) if len(kind) == 1 else encode(PHOTOGRAPH, kind[0], progressive=True)
                          for kind in (("JPEG",), ("JPEG", 1), ("PNG",)))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows, lines=None, interlaced=0):
    """A PNG of these rows (H, W, 3) whose header promises `lines` of them."""
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", rows.shape[1], lines or len(rows), 8, 2, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def half(data):
    return data[: len(data) // 2]


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


ROWS = np.asarray(PHOTOGRAPH)
DAMAGED = {
    "a JPEG whose second half is zeros": half(JPEG) + bytes(len(JPEG) - len(half(JPEG)) - 2) + b"\xff\xd9",
    "a cut JPEG with an end marker": half(JPEG) + b"\xff\xd9",
    "a cut progressive JPEG with an end marker": half(PROGRESSIVE) + b"\xff\xd9",
    "a PNG with half of its rows": png(ROWS[:45], 90),
    "a PNG with a wrong checksum": flipped(PNG, PNG.index(b"IEND") - 6),
    "a PNG without its end": PNG[:-12],
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damage_that_decoders_pass_over_is_refused_and_named(data, tmp_path):
    root = make_images(tmp_path / "images", {"a/1.jpg": data, "a/2.jpg": JPEG})
    with pytest.raises(InputError, match=r"1.jpg: cannot decode this image.*--skip-bad"):
        pack(open_source(root), tmp_path / "out", Packing(), workers=0)
    assert pack(open_source(root), tmp_path / "out", Packing(skip_bad=True), workers=0).count == 1
    directory = plain_tar(tmp_path / "in/x.tar", [("k.jpg", data), ("k.cls", b"0")])
    problem, = check_shards(directory).problems
    assert "'k': cannot decode this image" in problem


def test_good_images_of_every_kind_pass():
    kinds = [("JPEG", options) for options
             in ({"quality": 30}, {"quality": 100, "subsampling": 0}, {"progressive": True},
                                               {"restart_marker_blocks": 4}, {"optimize": True})]
    kinds += [("PNG", {}), ("PNG", {"compress_level": 0}), ("WEBP", {}), ("BMP", {})]
    modes = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "RGBA", "L", "LA", "P", "1"), "WEBP": ("RGB",),
             "BMP": ("RGB", "L")}
    for (kind, options), size in itertools.product(kinds, ((120, 90), (1, 1), (17, 33))):
        for mode in modes[kind]:
            data = encode(PHOTOGRAPH.resize(size).convert(mode), kind, **options)
            assert damage_of(data) is None, (kind, options, size, mode)
            decode_image(data, "x")
    assert damage_of(png(ROWS)) is None


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 9), (8, 8), (31, 17)])
def test_the_rows_of_interlaced_pngs_are_counted(size):
    """Against the passes written out by their places."""
    columns, rows = size
    # Rows, columns.
    starts = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
    data = b""
    for top, down, left, right in starts:
        part = ROWS[:rows, :columns][top::down, left::right]
        data += b"".join(b"\0" + row.tobytes() for row in part if len(row))
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 1)
    image, short = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels))
                    + chunk(b"IEND", b"")
                    for pixels in (data, data[:-1]))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image))), ROWS[:rows, :columns])
    assert damage_of(image) is None and "bytes of pixels" in damage_of(short)


def test_without_simplejpeg_a_jpeg_is_judged_by_pillow_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert damage_of(DAMAGED["a cut JPEG with an end marker"]) is None
