"""Finding the images of a data set kept as files, one directory per class."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gigatok_ds.data.tar_scan import IMAGE_EXTENSIONS
from gigatok_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Images in a fixed order: `labels[i]` is the position of the class of `paths[i]` in `classes`."""

    paths: list[Path]
    labels: list[int]
    classes: list[str]


def scan_image_folder(root: str | Path) -> ImageFolder:
    """List the images under `root`: one class per sub-directory, numbered by sorted name.

    A directory that holds images and no sub-directories is one class with the directory's name. Images are
    looked for at any depth inside a class and ordered by path; hidden files and directories are left out, and
    a class directory (but nothing below it) may be a link. Raises InputError when `root` is missing, holds no
    images or mixes images with class directories, and when a class is empty, for leaving it out would
    renumber the others.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"image directory {root} does not exist or is not a directory")
    children = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    directories = [path for path in children if path.is_dir()]
    loose = [path for path in children if is_image(path.name) and path.is_file()]
    if directories and loose:
        raise InputError(f"{root} holds both images ({loose[0].name}) and directories "
                         f"({directories[0].name}); keep images alone (one class) or one directory per class")
    members = {path.name: _images_below(path) for path in directories}
    if loose:
        members = {root.resolve().name: loose}
    if not any(members.values()):
        raise InputError(f"no images under {root}: looked for files ending in {', '.join(IMAGE_EXTENSIONS)}, "
                         "directly in it or in one directory per class")
    empty = [name for name, paths in members.items() if not paths]
    if empty:
        raise InputError(f"class directory {root / empty[0]} holds no images ({len(empty)} such of "
                         f"{len(members)}); add images or remove it")
    classes = sorted(members)
    return ImageFolder(paths=[path for name in classes for path in members[name]],
                       labels=[label for label, name in enumerate(classes) for _ in members[name]],
                       classes=classes)


def is_image(name: str) -> bool:
    """Whether a file of this name (without directories) is an image, and not hidden."""
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in name


def _images_below(directory: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if is_image(name)]
    return sorted(found)
