"""Arrays in `.npy` and `.npz` files that somebody else wrote: plain ones only, of no more bytes than there are."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gigatok_ds.untrusted import read_bytes, reading

ARRAY_BYTES = 16 * 1024**3

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member of a zip: signature, lengths of its name and of extra fields


def read_npy(path: Path, most: int = ARRAY_BYTES) -> np.ndarray:
    """A plain array of a `.npy` file. Raises InputError when it is not one, or claims more than the file holds."""
    with reading(path):
        return parse_npy(read_bytes(path, most))


def read_npz(source: Path | bytes, most: int = ARRAY_BYTES, name: object = None) -> dict[str, np.ndarray]:
    """All arrays of an `.npz`, by name. Raises InputError when it is damaged, not one, or unpacks to more than `most`
    bytes.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with reading(name or source), zipfile.ZipFile(file) as archive:
        return {member.filename.removesuffix(".npy"): parse_npy(unpacked(archive, member, most))
                for member in archive.infolist()}


def map_npz(file: BinaryIO) -> dict[str, np.ndarray]:
    """All arrays of an open `.npz`, by name, read-only: those stored as they are stay in the file and are mapped, so
    that processes share them; compressed ones are read. Raises what zipfile and numpy do, or ValueError.
    """
    with zipfile.ZipFile(file) as archive:
        return {member.filename.removesuffix(".npy"): _mapped(file, member)
                if member.compress_type == zipfile.ZIP_STORED else parse_npy(unpacked(archive, member))
                for member in archive.infolist()}


def _mapped(file: BinaryIO, member: zipfile.ZipInfo) -> np.ndarray:
    file.seek(member.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = member.header_offset + _LOCAL_HEADER.size + name + extra
    if signature != b"PK\3\4" or start + member.file_size > file.seek(0, io.SEEK_END):
        raise ValueError(f"{member.filename} is not where the file says")
    file.seek(start)
    shape, fortran_order, dtype = npy_header(file)
    offset, size = file.tell(), math.prod(shape) * dtype.itemsize
    if offset + size > start + member.file_size:
        raise ValueError(f"its header claims {size:,} bytes, there are {start + member.file_size - offset:,}")
    if not size:
        return np.empty(shape, dtype)
    return np.asarray(np.memmap(file, dtype, "r", offset, shape, "F" if fortran_order else "C"))


def unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo, most: int = ARRAY_BYTES) -> bytes:
    """A member's content. Raises ValueError when it is longer than `most` bytes."""
    with archive.open(member) as file:
        data = file.read(min(member.file_size, most) + 1)
    if len(data) > min(member.file_size, most):
        raise ValueError(f"{member.filename} is longer than it says, or than the {most:,} bytes that it may have")
    return data


def parse_npy(data: bytes) -> np.ndarray:
    """The plain array that is the content of a `.npy`. Raises whatever numpy does, or ValueError."""
    file = io.BytesIO(data)
    shape, _, dtype = npy_header(file)
    size = math.prod(shape) * dtype.itemsize
    if len(data) - file.tell() < size:
        raise ValueError(f"its header claims {size:,} bytes, there are {len(data) - file.tell():,}")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def npy_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of the plain array whose `.npy` begins here. Raises whatever numpy does, or
    ValueError.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if dtype.hasobject or not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"it is no plain array ({dtype}, {shape})")
    return shape, fortran_order, dtype
