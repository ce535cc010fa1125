"""Images in Parquet files, as Hugging Face's `datasets` writes them: a column of {bytes, path}, and one of labels.

https://huggingface.co/docs/hub/datasets-image#parquet-format. What a class is called is in the schema's metadata, under
`huggingface`: the names of a ClassLabel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigatok_ds.errors import InputError
from gigatok_ds.packing.listing import ImageSource, SourceImage, numbered_key, numbered_labels
from gigatok_ds.packing.parquet_files import LABEL_COLUMNS, image_column, open_parquet, parquet_files, read_columns
from gigatok_ds.shards.tar_scan import NO_LABEL

if TYPE_CHECKING:
    import pyarrow


def parquet_source(path: Path, field: str | None) -> ImageSource:
    """The images of a file, or of all files below a directory. field: the column of labels, `label` or `class` if None.

    Numbers are labels; names become classes in the order of the alphabet. Raises InputError for files without images.
    """
    images: list[SourceImage] = []
    values: list[Any] = []
    classes: list[str] = []
    for file in parquet_files(path):
        schema = open_parquet(file).schema_arrow
        column = image_column(schema, file)
        found = _label_column(schema.names, field, file)
        names = _class_names(schema, found) if found else []
        if images and names != classes:
            raise InputError(f"{file} names other classes than the files before it; pack them one by one")
        classes = names
        columns = read_columns(file, [*([found] if found else []), f"{column}.path"])
        paths = columns[column]
        values += columns[found] if found else [None] * len(paths)
        images += [SourceImage(numbered_key(len(images) + row, Path((place or {}).get("path") or file.stem).stem),
                               NO_LABEL, str(file), row=row) for row, place in enumerate(paths)]
    if not images:
        raise InputError(f"{path} holds no rows of images")
    labels, classes = numbered_labels(values, classes, str(path))
    return ImageSource(images=[image._replace(label=label) for image, label in zip(images, labels, strict=True)],
                       classes=classes)


def _label_column(names: list[str], field: str | None, file: Path) -> str | None:
    if field is None:
        return next((name for name in LABEL_COLUMNS if name in names), None)
    if field not in names:
        raise InputError(f"{file} has no column {field!r} (--label-field); its columns are {', '.join(names)}")
    return field


def _class_names(schema: pyarrow.Schema, column: str) -> list[str]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
        return [str(name) for name in (names.values() if isinstance(names, dict) else names)]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return []
