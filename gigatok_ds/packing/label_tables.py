"""Tables that say which class each image has: CSV files with a line of column names, and Parquet files."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from gigatok_ds.errors import InputError
from gigatok_ds.packing.parquet_files import LABEL_COLUMNS, open_parquet, parquet_files, read_columns
from gigatok_ds.shards.tar_scan import IMAGE_EXTENSIONS
from gigatok_ds.untrusted import reading

KAGGLE = "ImageId,PredictionString"  # LOC_val_solution.csv begins so; its second column holds more than a class
# Of names or keys, the first of these that there is; img2dataset writes `key`.
NAME_COLUMNS = ("key", "__key__", "name", "file_name", "filename", "path", "image", "image_id", "id")


def is_table(path: Path) -> bool:
    """Whether it is a directory or file of Parquet, or a CSV file other than Kaggle's."""
    if path.is_dir() or path.suffix == ".parquet":
        return True
    if path.suffix.lower() != ".csv" or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.readline(4096).decode("utf-8-sig", "replace").strip() != KAGGLE


def table_of_labels(path: Path, field: str | None) -> tuple[dict[str, str], bool]:
    """(class by name, whether names have no extension).

    field: the column of classes. Raises InputError without the columns, and when two rows say different classes of a
    name.
    """
    classes: dict[str, str] = {}
    for name, label in _csv_rows(path, field) if path.suffix.lower() == ".csv" else _parquet_rows(path, field):
        if classes.setdefault(name, label) != label:
            raise InputError(f"{path}: one row says that {name} is {classes[name]}, another that it is {label}; remove "
                             "one of them")
    by_stem = not any(name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS for name in classes)
    return classes, by_stem


def _csv_rows(path: Path, field: str | None) -> Iterable[tuple[str, str]]:
    with reading(path, "give a CSV file in UTF-8 whose first line names its columns"), open(
            path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    name, label = _columns(list(rows[0]) if rows else [], field, path)
    return [(row[name], row[label]) for row in rows if row[name] and row[label]]


def _parquet_rows(path: Path, field: str | None) -> Iterable[tuple[str, str]]:
    if not (files := parquet_files(path)):
        raise InputError(f"--labels: {path} holds no Parquet files; a directory may be given for these only")
    for file in files:
        name, label = _columns(open_parquet(file).schema_arrow.names, field, file)
        columns = read_columns(file, [name, label])
        for key, value in zip(columns[name], columns[label], strict=True):
            if key is not None and value is not None:
                yield str(key), str(value)


def _columns(names: list[str], field: str | None, path: Path) -> tuple[str, str]:
    wanted = LABEL_COLUMNS if field is None else (field,)
    name, label = (next((column for column in kinds if column in names), None) for kinds in (NAME_COLUMNS, wanted))
    if name is None or label is None:
        lacking = f"of names ({', '.join(NAME_COLUMNS)})" if name is None else (
            f"of classes ({', '.join(wanted)}; --label-field names another)")
        raise InputError(f"{path} has no column {lacking}; its columns are {', '.join(map(str, names)) or 'none'}")
    return name, label
