"""Files that say which class each image of a source has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

from gigatok_ds.errors import InputError
from gigatok_ds.file_kinds import is_compressed_tar
from gigatok_ds.packing.devkit import devkit_classes
from gigatok_ds.packing.label_tables import KAGGLE, is_table, table_of_labels
from gigatok_ds.untrusted import reading


def read_labels(path: str | Path, names: list[str], field: str | None = None) -> tuple[list[str], list[str]]:
    """(the class name of each of the images, lines for the user). `names` are their paths in the source, in its order.

    `path` is ImageNet's ILSVRC2012_devkit_t12.tar.gz, which gives the validation images' classes in the order of their
    file names; Kaggle's LOC_val_solution.csv; a CSV or Parquet file, or a directory of Parquet files, with a column of
    names or keys and one of classes (`field`, `label` or `class` if None); or a text file with a line `NAME CLASS` for
    each image. A name is an image's path in the source or, where no other has the same, its file name. Raises
    InputError when an image has no class or two, or a line fits two images.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"--labels: {path} does not exist")
    tabular = is_table(path)
    if field is not None and not tabular:
        raise InputError(f"--label-field names a column of a table; {path} is none (a CSV file with a line of names, "
                         "or Parquet)")
    bases = Counter(_base(name) for name in names)
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise InputError(
            f"{repeated[0]} occurs {names.count(repeated[0])} times in the source, so its label may be of any; "
            "keep one of them"
        )
    if is_compressed_tar(path.name):
        _only_once(bases, names, path)
        classes = devkit_classes(path)
        if len(classes) != len(names):
            raise InputError(f"{path} gives the classes of {len(classes)} images; there are {len(names)}")
        in_order = dict(zip(sorted(bases), classes, strict=True))
        return [in_order[_base(name)] for name in names], []
    lines, by_stem = table_of_labels(path, field) if tabular else _lines(path)
    said = {_normal(name): name for name in lines}
    called = [_key(name, by_stem) for name in names]
    ambiguous = {base for base, count in Counter(map(_base, called)).items() if count > 1}
    found, lacking = {}, []
    for name, key in zip(names, called, strict=True):
        base = _base(key)
        if key in said:
            found[name] = said[key]
        elif base in said and base in ambiguous:
            _only_once(Counter({base: 2}), called, path)
        elif base in said:
            found[name] = said[base]
        else:
            lacking.append(name)
    if lacking:
        raise InputError(f"{path} has no line for {lacking[0]} ({len(lacking)} such of {len(names)} images)")
    rest = sorted(set(said.values()) - set(found.values()))
    notes = [f"{len(rest)} of {len(lines)} lines of {path} are for images that are not there, such as "
             f"{rest[0]}"] if rest else []
    return [lines[found[name]] for name in names], notes


def _only_once(bases: Counter, names: list[str], path: Path) -> None:
    for base, count in bases.items():
        if count > 1:
            first, second = [name for name in names if _base(name) == base][:2]
            raise InputError(
                f"{path} tells images by their file names, but {first} and {second} have the same; a line for "
                "each with its path, as it is written here, tells them apart"
            )


def _lines(path: Path) -> tuple[dict[str, str], bool]:
    """(class by name, whether the names have no extension)."""
    with reading(path, "give a text file in UTF-8 with a line NAME CLASS for each image"):
        lines = path.read_text("utf-8-sig").splitlines()
    kaggle = bool(lines) and lines[0].strip() == KAGGLE
    classes: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines[1:] if kaggle else lines, 2 if kaggle else 1):
        words = line.replace(",", " ", 1).split()[:2] if kaggle else line.split()
        if len(words) not in (0, 2):
            raise InputError(f"{path}, line {number}: {line[:60]!r} is not of the form NAME CLASS")
        if not words:
            continue
        name, label = words
        if classes.setdefault(name, label) != label:
            raise InputError(
                f"{path}: line {numbers[name]} says that {name} is {classes[name]}, line {number} that it is "
                f"{label}; remove one of them"
            )
        numbers.setdefault(name, number)
    return classes, kaggle


def _normal(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _key(name: str, by_stem: bool) -> str:
    name = _normal(name)
    return str(PurePosixPath(name).with_suffix("")) if by_stem else name


def _base(name: str) -> str:
    return name.rpartition("/")[2]
