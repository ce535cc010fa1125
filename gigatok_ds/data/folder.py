"""Finding the images of a data set kept as files, one directory per class."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from gigatok_ds.errors import InputError
from gigatok_ds.shards.tar_scan import IMAGE_EXTENSIONS

MAX_NUMBER = 99_999  # of a class that is named by a number


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Images in a fixed order: `labels[i]` is the position of the class of `paths[i]` in `classes`.

    `flat` says that there are no directories of classes. `left_out` counts all other files, by reason.
    """

    paths: list[Path]
    labels: list[int]
    classes: list[str]
    flat: bool = False
    left_out: Counter = field(default_factory=Counter)


def scan_image_folder(root: str | Path, *, mixed: bool = False) -> ImageFolder:
    """List the images under `root`: one class per sub-directory, numbered as `class_order` says.

    A directory that holds images and no sub-directories is one class with the directory's name. Images are
    looked for at any depth inside a class and ordered by path; hidden files and directories are left out, and
    a class directory (but nothing below it) may be a link. mixed: images beside directories are taken, too, all of them
    without classes, as a flat directory's. Raises InputError when `root` is missing, holds no
    images or mixes images with class directories, and when a class is empty, for leaving it out would
    renumber the others.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"image directory {root} does not exist or is not a directory")
    left_out: Counter = Counter()
    directories, loose = _children(root, left_out)
    if directories and loose and mixed:
        loose, directories = images_below(root, left_out := Counter()), []
    if directories and loose:
        raise InputError(f"{root} holds both images ({loose[0].name}) and directories "
                         f"({directories[0].name}); keep images alone (one class) or one directory per class")
    members = {path.name: images_below(path, left_out) for path in directories}
    if loose:
        members = {root.resolve().name: loose}
    if not any(members.values()):
        raise InputError(f"no images under {root}: looked for files ending in {', '.join(IMAGE_EXTENSIONS)}, "
                         "directly in it or in one directory per class")
    empty = [name for name, paths in members.items() if not paths]
    if empty:
        raise InputError(f"class directory {root / empty[0]} holds no images ({len(empty)} such of "
                         f"{len(members)}); add images or remove it")
    classes, number = ([*members], dict.fromkeys(members, 0)) if loose else class_order(members, str(root))
    names = sorted(members, key=number.__getitem__)
    return ImageFolder(paths=[path for name in names for path in members[name]],
                       labels=[number[name] for name in names for _ in members[name]],
                       classes=classes, flat=bool(loose), left_out=left_out)


def class_order(names, source: str) -> tuple[list[str], dict[str, int]]:
    """(the class names by number, the number of each name): in the order of the names.

    Where all names are whole numbers, the number is the class; numbers without a name are named by themselves. Raises
    InputError, naming `source`, when two names are the same number, or one is above MAX_NUMBER.
    """
    names = sorted(set(names))
    if not all(name.isascii() and name.isdecimal() for name in names):
        return names, {name: number for number, name in enumerate(names)}
    number = {name: int(name) for name in names}
    named = {value: name for name, value in reversed(number.items())}
    if len(named) < len(names):
        twice = next(name for name in names if named[number[name]] != name)
        raise InputError(
            f"{source}: the classes {named[number[twice]]} and {twice} are the same number; rename one of them"
        )
    if (most := max(named)) > MAX_NUMBER:
        raise InputError(
            f"{source}: all classes are whole numbers, which would be their labels, but {most} is more than "
            f"{MAX_NUMBER}; give the classes names that do not only hold digits"
        )
    return [named.get(value, str(value)) for value in range(most + 1)], number


def is_image(name: str) -> bool:
    """Whether a file of this name (without directories) is an image, and not hidden."""
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in name


def why_no_image(name: str) -> str:
    """What a file that is left out, of this name (without directories), is called where it is counted."""
    if name.startswith("."):
        return "hidden files"
    return f".{name.rpartition('.')[2].lower()} files" if "." in name else "files without extension"


def images_below(directory: Path, left_out: Counter) -> list[Path]:
    """The images at any depth, in the order of their paths; what else there is, is counted by reason."""
    found, waiting = [], [directory]
    while waiting:
        directories, images = _children(waiting.pop(), left_out, links=False)
        found += images
        waiting += directories
    return sorted(found)


def holds_images(directory: Path) -> bool:
    """Whether there is an image at any depth."""
    return any(is_image(name) for _, _, names in os.walk(directory) for name in names)


def _children(directory: Path, left_out: Counter, links: bool = True) -> tuple[list[Path], list[Path]]:
    """(directories, images) in a directory. Only regular files, and links to them, are images; `links` to directories
    may be directories."""
    directories, images = [], []
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=links):
            if entry.name.startswith("."):
                left_out["hidden directories"] += 1
            else:
                directories.append(Path(entry.path))
        elif entry.is_file():
            if is_image(entry.name):
                images.append(Path(entry.path))
            else:
                left_out[why_no_image(entry.name)] += 1
        elif entry.is_symlink():
            left_out["links to directories" if entry.is_dir() else "broken links"] += 1
        else:
            left_out["special files"] += 1
    return directories, images
