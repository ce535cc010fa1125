"""Images to be packed into shards, wherever they lie: a folder, ImageNet's own tars read without unpacking, or shards.

A source lists its images in a fixed order, with the byte range of each in its file, so that any process can read any
of them, and counts whatever else is there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from gigatok_ds.data.folder import ImageFolder, class_order, images_below, is_image, scan_image_folder, why_no_image
from gigatok_ds.errors import InputError
from gigatok_ds.packing.label_files import read_labels
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.tar_members import FILE, Member, is_compressed_tar, is_tar, tar_members
from gigatok_ds.shards.tar_scan import safe_key

_SYNSET_TAR = re.compile(r"n\d{8}\.tar", re.IGNORECASE)
_KEY_NAME = 20  # characters of a file name in a key
IMAGENET = {"train": (1000, 1_281_167), "val": (1000, 50_000)}  # classes and images


class SourceImage(NamedTuple):
    """One encoded image: `size` bytes at `offset` of the file `path` (size None: the whole file)."""

    key: str
    label: int
    path: str
    offset: int = 0
    size: int | None = None
    member: str | None = None  # its name in the tar

    @property
    def name(self) -> str:
        """What error messages call it."""
        return f"{self.path}: {self.member}" if self.member else self.path

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read() if self.size is None else file.read(self.size)
        if self.size is not None and len(data) != self.size:
            raise InputError(f"{self.name}: the file has become shorter while it was read")
        return data


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """`images` in their order; the label of each is a position in `classes`, which is empty when names are unknown.

    `left_out` counts everything else that is there, by reason; `notes` are lines for the user.
    """

    images: list[SourceImage]
    classes: list[str]
    left_out: Counter = field(default_factory=Counter)
    notes: Sequence[str] = ()


def open_source(path: str | Path, labels: str | Path | None = None) -> ImageSource:
    """The images of a directory (classes, shards, or ImageNet's nNNNNNNNN.tar files) or of one of ImageNet's tars.

    `labels` says which class each image of ILSVRC2012_img_val.tar, or of a directory without classes, has; see
    `read_labels`. Raises InputError when there is nothing to read, or labels are missing or do nothing.
    """
    path = Path(path)
    if path.is_dir():
        return _directory(path, labels)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a directory of images or shards, or one of ImageNet's tars")
    members = list(tar_members(path))
    inner = [member for member in members if member.kind == FILE and is_tar(_base(member))]
    packed = [member for member in members if is_compressed_tar(_base(member))]
    if packed:
        raise InputError(
            f"{path} holds {packed[0].name}, which is compressed ({len(packed)} such members); decompress them"
        )
    if not inner:
        return _labelled_tar(path, members, labels)
    if labels is not None:
        raise InputError(f"--labels goes with images without classes; {path} has classes, leave it out")
    beside = Counter(f"{_why(member) or 'images'} beside the classes' tars" for member in members if member
                     not in inner)
    return _class_tars([(path, member.offset, member.size, member.name) for member in inner], beside)


def _directory(path: Path, labels: str | Path | None) -> ImageSource:
    tars = sorted(child for child in path.iterdir() if is_tar(child.name))
    packed = sorted(child.name for child in path.iterdir() if is_compressed_tar(child.name) and "devkit"
                    not in child.name)
    if packed:
        raise InputError(
            f"{path / packed[0]} is compressed ({len(packed)} such files there); decompress it, or move it away"
        )
    if not tars:
        return _folder(path) if labels is None else _labelled_folder(path, labels)
    if labels is not None:
        raise InputError(f"--labels goes with images without classes; {path} is a directory of tars that say their "
                         "classes, leave it out")
    if not all(_SYNSET_TAR.fullmatch(tar.name) for tar in tars):
        return _shards(path)
    beside = Counter(why_no_image(child.name) for child in path.iterdir() if child not in tars)
    return _class_tars([(tar, 0, tar.stat().st_size, tar.name) for tar in tars], beside)


def _folder(path: Path) -> ImageSource:
    folder = scan_image_folder(path)
    if folder.flat:
        raise InputError(
            f"{path} holds {len(folder.paths)} images and no directories of classes; give --labels (a file with "
            "a line NAME CLASS for each, Kaggle's LOC_val_solution.csv, or ImageNet's devkit), or put the images "
            "of each class into a directory of its own"
        )
    return _of_files(folder)


def _labelled_folder(path: Path, labels: str | Path) -> ImageSource:
    left_out: Counter = Counter()
    paths = images_below(path, left_out)
    if not paths:
        raise InputError(f"no images under {path}")
    classes, numbers, notes = _numbered_classes(labels, [str(file.relative_to(path)) for file in paths])
    folder = ImageFolder(paths=paths, labels=numbers, classes=classes, left_out=left_out)
    return _of_files(folder, (*notes, *_unlike_imagenet("val", paths[0].name, classes, len(paths))))


def _of_files(folder: ImageFolder, notes: Sequence[str] = ()) -> ImageSource:
    images = [SourceImage(_numbered(number, file.stem), label, str(file))
              for number, (file, label) in enumerate(zip(folder.paths, folder.labels, strict=True))]
    return ImageSource(images=images, classes=folder.classes, left_out=folder.left_out, notes=notes)


def _shards(path: Path) -> ImageSource:
    index = ShardIndex.open(path)
    images = []
    for i in range(len(index)):
        name, offset, size = index.place(i)
        images.append(SourceImage(index.key(i), index.label(i), str(path / name), offset, size, index.key(i)))
    return ImageSource(images=images, classes=index.classes)


def _class_tars(tars: list[tuple[Path, int, int, str]], left_out: Counter) -> ImageSource:
    """Tars of one class each, named after it: (file, offset, size, name)."""
    names = [Path(name).stem for _, _, _, name in tars]
    if len(set(names)) < len(names):
        raise InputError(f"{tars[0][0]}: two tars have the same class name")
    classes, number = class_order(names, str(tars[0][0]))
    images: list[SourceImage] = []
    tars = sorted(tars, key=lambda tar: number[Path(tar[3]).stem])
    for path, offset, size, name in tqdm(tars, desc="reading", unit="class", disable=None):
        found = _images(tar_members(path, offset, size, f"{path}: {name}"), left_out)
        if not found:
            raise InputError(f"{path}: {name} holds no images")
        label = number[Path(name).stem]
        images += [_image(len(images) + position, member, label, path) for position, member in enumerate(found)]
    return ImageSource(images=images, classes=classes, left_out=left_out,
                  notes=_unlike_imagenet("train", Path(tars[0][3]).name, classes, len(images)))


def _labelled_tar(path: Path, members: list[Member], labels: str | Path | None) -> ImageSource:
    left_out: Counter = Counter()
    found = _images(members, left_out)
    if not found:
        raise InputError(f"{path} holds neither images nor tars of images")
    if labels is None:
        raise InputError(f"{path} does not say which class its images have; give --labels: "
                         "ILSVRC2012_devkit_t12.tar.gz, or a text file with a line NAME CLASS for each")
    classes, numbers, notes = _numbered_classes(labels, [member.name for member in found])
    images = [_image(number, member, label, path)
              for number, (member, label) in enumerate(zip(found, numbers, strict=True))]
    return ImageSource(images=images, classes=classes, left_out=left_out,
                  notes=(*notes, *_unlike_imagenet("val", _base(found[0]), classes, len(images))))


def _numbered_classes(labels: str | Path, names: list[str]) -> tuple[list[str], list[int], list[str]]:
    """(class names, the number of each image's class, lines for the user)."""
    class_of, notes = read_labels(labels, names)
    classes, number = class_order(class_of, str(labels))
    return classes, [number[name] for name in class_of], notes


def _unlike_imagenet(split: str, first: str, classes: list[str], images: int) -> list[str]:
    """A line where the names of the files are ImageNet's, but there are more or fewer of them."""
    ours = _SYNSET_TAR.fullmatch(first) if split == "train" else first.startswith("ILSVRC2012_val_")
    if not ours or (len(classes), images) == IMAGENET[split]:
        return []
    return [f"these are {len(classes):,} classes and {images:,} images; ImageNet's are {IMAGENET[split][0]:,} and "
            f"{IMAGENET[split][1]:,}: is the download complete?"]


def _images(members: Iterable[Member], left_out: Counter) -> list[Member]:
    """The images, in the order of their names; the other members are counted by reason."""
    found = []
    for member in members:
        if reason := _why(member):
            left_out[reason] += 1
        else:
            found.append(member)
    return sorted(found)


def _why(member: Member) -> str | None:
    """The reason why a member is no image, if it is none."""
    if member.kind != FILE:
        return member.kind
    name = _base(member)
    if not is_image(name):
        return why_no_image(name)
    return None if member.size else "empty files"


def _base(member: Member) -> str:
    return member.name.rpartition("/")[2]


def _image(number: int, member: Member, label: int, path: Path) -> SourceImage:
    key = _numbered(number, Path(member.name).stem)
    return SourceImage(key, label, str(path), member.offset, member.size, member.name)


def _numbered(number: int, stem: str) -> str:
    """The number keeps keys unique; the (shortened) name lets a person find the file again."""
    return f"{number:08d}_{safe_key(stem)[:_KEY_NAME]}"
