"""Reading Parquet files by pyarrow, which need not be installed."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigatok_ds.errors import InputError
from gigatok_ds.untrusted import reading

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

LABEL_COLUMNS = ("label", "labels", "class", "cls")  # the first of these that there is
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test")
_ADVICE = "copy it again, or write it anew"


def parquet_files(path: Path) -> list[Path]:
    """The file itself, those that a pattern (`data/train-*.parquet`) names, or those of a directory and of its
    directories, in the order of their names. Raises InputError for several splits of a data set: one is to be chosen.
    """
    if path.is_file():
        return [path]
    if "*" in path.name:
        return sorted(path.parent.glob(path.name))
    found = sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")])
    splits = sorted({split for file in found for split in _SPLITS if re.match(rf"{split}[-_.]", file.name)})
    if len(splits) > 1:
        raise InputError(f"{path} holds Parquet files of {len(splits)} splits, {' and '.join(splits)}; give those of "
                         f"one, such as '{found[0].parent}/{splits[0]}-*.parquet'")
    return found


def open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """Raises InputError for what is none, and where pyarrow is not installed."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet files needs pyarrow; pip install 'gigatok_ds[parquet]'") from None
    with reading(path, f"{_ADVICE} (a Parquet file is expected)"):
        file = parquet.ParquetFile(path)
        _ = file.schema_arrow.names  # which is made of what the file says only when it is asked for
        return file


def read_columns(path: Path, columns: Sequence[str]) -> dict[str, list]:
    """The values of columns (`image.path`: a part of one, in dictionaries), by the name of the column."""
    file = open_parquet(path)
    with reading(path, _ADVICE):
        table = file.read(columns=list(columns))
        return {name: _all_of(table.column(name), file.metadata.num_rows, path) for name in table.column_names}


def _all_of(column: pyarrow.ChunkedArray, rows: int, path: str | Path) -> list:
    """The values of a column, as many as the file says that there are."""
    values = column.to_pylist()
    if len(values) != rows:
        raise InputError(f"{path} is damaged: it holds {len(values)} of {rows} rows of a column; {_ADVICE}")
    return values


def image_column(schema: pyarrow.Schema, file: Path) -> str:
    """The column whose values are {bytes, path}; InputError unless there is one."""
    columns = [name for name, kind in zip(schema.names, schema.types, strict=True) if _is_image(kind)]
    if len(columns) != 1:
        raise InputError(f"{file} has {len(columns)} columns of images, which are structs of bytes and path, as "
                         f"datasets writes them; its columns are {', '.join(schema.names)}")
    return columns[0]


def _is_image(kind: pyarrow.DataType) -> bool:
    """Whether a type is a struct of `bytes`, bytes of any length, and `path`, text."""
    from pyarrow import types

    if not types.is_struct(kind):
        return False
    parts = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
    return {"bytes", "path"} <= parts.keys() and (
        types.is_binary(parts["bytes"]) or types.is_large_binary(parts["bytes"])) and (
        types.is_string(parts["path"]) or types.is_large_string(parts["path"]) or types.is_null(parts["path"]))


def read_image(path: str, row: int) -> bytes:
    """The bytes of the image in a row of a file."""
    _, starts, column = _opened(path)
    group = max(number for number, start in enumerate(starts) if start <= row)
    data = _group(path, group, column)[row - starts[group]]
    if not data:
        raise InputError(f"{path}: row {row} holds no bytes, only a path at most; pack the images that lie there")
    return data


@functools.lru_cache(maxsize=4)
def _opened(path: str) -> tuple[Any, list[int], str]:
    file = open_parquet(Path(path))
    with reading(path, _ADVICE):
        rows = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    return file, [sum(rows[:number]) for number in range(len(rows))], image_column(file.schema_arrow, Path(path))


@functools.lru_cache(maxsize=1)
def _group(path: str, group: int, column: str) -> list[bytes | None]:
    """Images are read in their order, and a row group only as a whole."""
    file = _opened(path)[0]
    with reading(path, _ADVICE):
        found = file.read_row_group(group, columns=[f"{column}.bytes"]).column(column)
        return [(value or {}).get("bytes") for value in _all_of(found, file.metadata.row_group(group).num_rows, path)]
