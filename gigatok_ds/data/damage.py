"""Damage that an image decoder passes over: it fills up what is lacking, where the rest of a picture can be shown."""

from __future__ import annotations

import struct
import zlib

_PNG = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG's colour type
_ADAM7 = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))


def damage_of(data: bytes) -> str | None:
    """What is wrong with an encoded image that can be decoded, in a few words; None if nothing is to be found.

    Of a JPEG it is what libjpeg warns of, asked through the package simplejpeg where that is installed; of a PNG the
    CRC-32 of each chunk, its end, and whether there are all rows. What still makes a valid picture, as some flipped
    bits of a JPEG do, nobody can tell.
    """
    if data.startswith(b"\xff\xd8"):
        return _warning_of_libjpeg(data)
    return _damage_of_png(data) if data.startswith(_PNG) else None


def _warning_of_libjpeg(data: bytes) -> str | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    try:
        _, _, colours, _ = simplejpeg.decode_jpeg_header(data)
        simplejpeg.decode_jpeg(data, colorspace="CMYK" if colours in ("CMYK", "YCCK") else "RGB")
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def _damage_of_png(data: bytes) -> str | None:
    at, packed, header = len(_PNG), [], b""
    try:
        while True:
            length, kind = struct.unpack_from(">I4s", data, at)
            body = data[at + 8 : at + 8 + length]
            stored, = struct.unpack_from(">I", data, at + 8 + length)
            if zlib.crc32(kind + body) != stored:
                return f"the CRC-32 of chunk {kind.decode('latin-1')!r} is wrong"
            if kind == b"IHDR":
                header = body
            if kind == b"IDAT":
                packed.append(body)
            if kind == b"IEND":
                break
            at += 12 + length
        found, wanted = len(zlib.decompressobj().decompress(b"".join(packed))), _unpacked_size(header)
    except struct.error:
        return "the file ends too early"
    except zlib.error as error:
        return str(error)
    return f"it has {found} of {wanted} bytes of pixels" if found < wanted else None


def _unpacked_size(header: bytes) -> int:
    """Bytes of all rows of a PNG, with the filter's byte of each."""
    width, height, depth, colours, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    size = 0
    for left, right_step, top, down_step in _ADAM7 if interlaced else ((0, 1, 0, 1),):
        columns, rows = -(-(width - left) // right_step), -(-(height - top) // down_step)
        if columns > 0:
            size += max(rows, 0) * (1 + -(-columns * depth * _CHANNELS[colours] // 8))
    return size
