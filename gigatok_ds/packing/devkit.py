"""The few fields of ImageNet's devkit that say which class a validation image has.

`meta.mat` is a MATLAB 5 file. scipy's reader ends the interpreter on some damaged ones, so what is needed of the format
(MathWorks, "MAT-File Format", level 5) is read here: structs, characters and numbers, packed or not.
"""

from __future__ import annotations

import math
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from gigatok_ds.errors import InputError
from gigatok_ds.untrusted import brief, members_in

_META, _TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
_ARCHIVE_BYTES, _FILE_BYTES = 2**30, 2**26  # of the archive, unpacked, and of each of the two files in it
_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_MATRIX, _PACKED = 14, 15
_CELL, _STRUCT, _CHARACTERS = 1, 2, 4
_DEEPEST = 8


def devkit_classes(path: Path) -> list[str]:
    """The class name (WNID) of each validation image, in the order of their names, of ILSVRC2012_devkit_t12.tar.gz.

    Raises InputError when the file is something else, or damaged.
    """
    try:
        found = dict(_files(path))
        names = {}
        for synset in variable(found[_META], "synsets"):
            (number,), (name,) = synset["ILSVRC2012_ID"], synset["WNID"]
            names[int(number)] = str(name)
        return [names[int(line)] for line in found[_TRUTH].split()]
    except Exception as error:
        raise InputError(f"{path} is not ImageNet's devkit ({type(error).__name__}: {brief(error)})") from None


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, "r:gz") as tar:
        for member in members_in(tar, _ARCHIVE_BYTES):
            name = Path(member.name).name
            if member.isreg() and name in (_META, _TRUTH):
                if member.size > _FILE_BYTES:
                    raise ValueError(f"{name} is {member.size} bytes long")
                file = tar.extractfile(member)
                assert file is not None  # a regular member has content
                yield name, file.read()


def variable(data: bytes, name: str) -> list:
    """A variable of a MATLAB 5 file: a flat list, of a dictionary for each element of a struct, of a text for each row
    of characters (all of it, for a single row), or of numbers. Raises ValueError, KeyError or struct.error."""
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None:
        raise ValueError("it is not a MATLAB 5 file")
    for kind, content in _elements(data[128:], order):
        if kind == _PACKED:
            kind, content = next(_elements(_unpacked(content), order))
        if kind == _MATRIX:
            found, values = _matrix(content, order, 0)
            if found == name:
                return values
    raise KeyError(name)


def _unpacked(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    full = unpacker.decompress(data, _FILE_BYTES)
    if unpacker.unconsumed_tail:
        raise ValueError("a variable is too large")
    return full


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, content) of each data element; the small ones have both in one word."""
    at = 0
    while at < len(data):
        (word,) = struct.unpack_from(order + "I", data, at)
        if word >> 16:
            kind, size, start, step = word & 0xFFFF, word >> 16, at + 4, 8
        else:
            kind, (size,), start = word, struct.unpack_from(order + "I", data, at + 4), at + 8
            step = 8 + size + (-size % 8 if kind != _PACKED else 0)
        if size > len(data) - start:
            raise ValueError(f"an element claims {size} bytes, there are {len(data) - start}")
        yield kind, data[start : start + size]
        at += step


def _matrix(data: bytes, order: str, depth: int) -> tuple[str, list]:
    """Name and content of an array."""
    if not data:
        return "", []
    if depth > _DEEPEST:
        raise ValueError("arrays lie too deep in one another")
    parts = _elements(data, order)
    flags, shape, letters = (_numbers(*next(parts), order) for _ in range(3))
    kind, count = int(flags[0]) & 0xFF, math.prod(map(int, shape))
    name = bytes(int(letter) & 0xFF for letter in letters).decode("latin-1")
    if kind == _STRUCT:
        (length,), (_, names) = _numbers(*next(parts), order), next(parts)
        if not 0 < length <= len(names):
            raise ValueError("the names of a struct are damaged")
        fields = [names[at : at + int(length)].split(b"\0")[0].decode("latin-1") for at
                  in range(0, len(names), int(length))]
        values = [_matrix(content, order, depth + 1)[1] for _, content in parts]
        if len(values) != count * len(fields):
            raise ValueError(f"a struct of {count} elements with {len(fields)} fields holds {len(values)} values")
        return name, [dict(zip(fields, values[at : at + len(fields)], strict=True))
                      for at in range(0, len(values), max(len(fields), 1))]
    if kind == _CELL:
        return name, [_matrix(content, order, depth + 1)[1] for _, content in parts]
    kind_of_data, content = next(parts, (2, b""))
    if kind == _CHARACTERS:
        encoding = _TEXTS[kind_of_data] + ({"<": "-le", ">": "-be"}[order] if _TEXTS[kind_of_data].startswith("utf-")
                                           and
                                           _TEXTS[kind_of_data] != "utf-8" else "")
        text, rows = content.decode(encoding), int(shape[0]) if shape else 0
        return name, [text[row::rows] for row in range(min(rows, len(text)))]
    return name, list(_numbers(kind_of_data, content, order))


def _numbers(kind: int, content: bytes, order: str) -> tuple:
    code = _NUMBERS[kind]
    return struct.unpack(f"{order}{len(content) // struct.calcsize(code)}{code}", content)
