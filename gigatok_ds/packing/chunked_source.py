"""Images in the shards of MosaicML's streaming (MDS) and in the chunks of litdata, read where they lie.

Neither library is needed: a file begins with the number of samples and where each begins (u32, of which the last says
where the file ends); a sample with the sizes of its columns (u32; in MDS only of those that vary in size), then their
data. What the columns are is in `index.json`. Layouts: MosaicML's documentation, "Dataset Format"; litdata's
PyTreeLoader.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gigatok_ds.errors import InputError
from gigatok_ds.packing.listing import ImageSource, SourceImage, numbered_key, numbered_labels
from gigatok_ds.packing.parquet_files import LABEL_COLUMNS
from gigatok_ds.shards.tar_scan import NO_LABEL
from gigatok_ds.untrusted import read_json, reading

INDEX = "index.json"
_ENCODED = ("jpeg", "jpg", "png", "image")  # kinds of columns that hold an image file, as it was
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes")  # of plain bytes
_CAPTION_COLUMNS = ("caption", "text", "txt")
_TEXTS = ("str", "text")
# Of one number; litdata's `int` is MDS's.
_NUMBERS = {"int": "q", "int8": "b", "int16": "h", "int32": "i", "int64": "q", "uint8": "B", "uint16": "H",
            "uint32": "I", "uint64": "Q"}
_ADVICE = "copy it again, or write it anew"


class _StoredColumn(NamedTuple):
    name: str
    kind: str
    size: int | None  # in bytes, None if it varies


class _SampleFile(NamedTuple):
    path: Path
    samples: int
    columns: list[_StoredColumn]


def is_chunked(path: Path) -> bool:
    """Whether a directory has an index of MDS shards or litdata chunks, as far as its first key tells."""
    index = path / INDEX
    if not index.is_file():
        return False
    with open(index, "rb") as file:
        return re.match(rb'\s*{\s*"(shards|version|chunks|config|updated_at)"', file.read(100)) is not None


def chunked_source(path: Path, field: str | None) -> ImageSource:
    """The images of a directory of MDS shards or litdata chunks.

    Images are a column of the kind jpeg, png or image, or one of bytes that is called so; labels the column `field`, or
    `label` or `class` if None; captions one called caption or text. Raises InputError where there is no such column,
    and for shards that are compressed or hold pixels.
    """
    images: list[SourceImage] = []
    values: list[Any] = []
    for chunk in _chunks(path):
        with reading(chunk.path, _ADVICE), open(chunk.path, "rb") as file:
            for row, (image, label, caption) in enumerate(_samples(file, chunk, field)):
                images.append(SourceImage(numbered_key(len(images), chunk.path.stem), NO_LABEL, str(chunk.path),
                                          image[0], image[1], f"sample {row}", caption))
                values.append(label)
    if not images:
        raise InputError(f"{path} holds no samples")
    labels, classes = numbered_labels(values, [], str(path))
    return ImageSource(images=[image._replace(label=label) for image, label in zip(images, labels, strict=True)],
                       classes=classes)


def _chunks(path: Path) -> list[_SampleFile]:
    index = path / INDEX
    with reading(index, _ADVICE):
        said = read_json(index)
        chunks = [_mds_shard(path, shard) for shard in said["shards"]] if "shards" in said else _litdata(path, said)
    for chunk in chunks:
        if not chunk.path.is_file():
            raise InputError(f"{index} names {chunk.path.name}, which is not there; {_ADVICE}")
    return chunks


def _mds_shard(path: Path, shard: dict) -> _SampleFile:
    if shard["format"] != "mds" or shard["version"] != 2:
        raise InputError(f"{path / INDEX}: format {shard['format']!r} (version {shard['version']!r}) is not read; "
                         "write the data as MDS")
    name = _name(shard["raw_data"]["basename"])
    if shard["zip_data"] and not (path / name).is_file():
        raise InputError(f"{path / _name(shard['zip_data']['basename'])} is compressed ({shard['compression']}); "
                         f"decompress it to {name} beside it, and so the others")
    columns = [_StoredColumn(str(name), str(kind), size) for name, kind, size in
               zip(shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True)]
    for _, _, size in columns:
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"a column is said to take {size!r} bytes")
    return _SampleFile(path / name, int(shard["samples"]), columns)


def _litdata(path: Path, said: dict) -> list[_SampleFile]:
    config = said["config"]
    loader = config.get("item_loader") or "PyTreeLoader"
    if config["compression"] or config.get("encryption") or loader != "PyTreeLoader":
        way = (f"compressed ({config['compression']})" if config["compression"] else "encrypted"
               if config.get("encryption") else f"written for {loader}")
        raise InputError(f"{path} is {way}; write it again as it is: litdata.optimize without compression or "
                         "encryption, of items that are dictionaries or tuples")
    names = _leaves(json.loads(config["data_spec"])[1])
    columns = [_StoredColumn(name, str(kind).partition(":")[0], None) for name, kind in
               zip(names, config["data_format"], strict=True)]
    return [_SampleFile(path / _name(chunk["filename"]), int(chunk["chunk_size"]), columns) for chunk in said["chunks"]]


def _name(text: object) -> str:
    name = str(text)
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise InputError(f"{INDEX}: {name!r} leads outside the directory")
    return name


def _leaves(spec: dict) -> list[str]:
    """The names of an item's values, by torch's description of a tree: of those in a dictionary their keys."""
    if spec["type"] is None:
        return [""]
    children = spec["children_spec"]
    keys = json.loads(spec["context"]) if spec["type"] == "builtins.dict" else range(len(children))
    return [f"{key}.{leaf}".rstrip(".") for key, child in zip(keys, children, strict=True) for leaf in _leaves(child)]


def _samples(file: BinaryIO, chunk: _SampleFile,
             field: str | None) -> Iterator[tuple[tuple[int, int], Any, tuple[int, int] | None]]:
    """(place of the image, label, place of the caption) of each sample: offsets and sizes in bytes."""
    image, label, caption = _chosen(chunk, field)
    starts = _starts(file, chunk)
    varying = struct.Struct(f"<{sum(not column.size for column in chunk.columns)}I")
    for start, end in pairwise(starts):
        sizes = iter(varying.unpack(os.pread(file.fileno(), varying.size, start)))
        places, offset = [], start + varying.size
        for column in chunk.columns:
            size = column.size or next(sizes)
            places.append((offset, size))
            offset += size
        if offset > end:
            raise ValueError("a sample is longer than its place")
        yield (places[image], None if label is None else _value(file, chunk.columns[label], places[label]),
               None if caption is None else places[caption])


def _starts(file: BinaryIO, chunk: _SampleFile) -> Sequence[int]:
    length = os.fstat(file.fileno()).st_size
    count, = struct.unpack("<I", file.read(4))
    if count != chunk.samples or 8 + 4 * count > length:
        raise ValueError(f"it says that it holds {count} samples, {INDEX} says {chunk.samples}")
    starts = struct.unpack(f"<{count + 1}I", file.read(4 * count + 4))
    if starts[0] < 8 + 4 * count or starts[-1] > length or any(start > end for start, end in pairwise(starts)):
        raise ValueError("its samples do not lie one behind the other")
    return starts


def _value(file: BinaryIO, column: _StoredColumn, place: tuple[int, int]) -> int | str:
    data = os.pread(file.fileno(), place[1], place[0])
    if column.kind in _NUMBERS:
        return struct.unpack(f"<{_NUMBERS[column.kind]}", data)[0]
    return int(data) if column.kind == "str_int" else data.decode()


def _chosen(chunk: _SampleFile, field: str | None) -> tuple[int, int | None, int | None]:
    """The numbers of the columns of images, labels and captions."""
    numbers = {column.name: number for number, column in enumerate(chunk.columns)}
    said = ", ".join(f"{column.name} ({column.kind})" for column in chunk.columns)
    encoded = [number for number, column in enumerate(chunk.columns) if column.kind in _ENCODED]
    named = [numbers[name] for name in _IMAGE_COLUMNS if name in numbers and chunk.columns[numbers[name]].kind
             == "bytes"]
    if len(encoded) != 1 and not (named and not encoded):
        raise InputError(f"{chunk.path} has {len(encoded)} columns of the kinds {', '.join(_ENCODED)}, and no bytes "
                         f"called {', '.join(_IMAGE_COLUMNS)} instead; its columns are {said}")
    if field is not None and field not in numbers:
        raise InputError(f"{chunk.path} has no column {field!r} (--label-field); its columns are {said}")
    label = next((numbers[name] for name in ([field] if field else LABEL_COLUMNS) if name in numbers), None)
    if label is not None and chunk.columns[label].kind not in (*_NUMBERS, *_TEXTS, "str_int"):
        raise InputError(f"{chunk.path}: column {chunk.columns[label].name!r} holds {chunk.columns[label].kind}; "
                         "labels are whole numbers or texts")
    captions = [numbers[name] for name in _CAPTION_COLUMNS if name in numbers and chunk.columns[numbers[name]].kind
                in _TEXTS]
    return encoded[0] if encoded else named[0], label, captions[0] if captions else None
