"""Images to be packed into shards, wherever they lie: a folder, a list of files, ImageNet's own tars read without
unpacking, shards, Parquet files, or the shards of other loaders.

A source lists its images in a fixed order, with the byte range of each in its file, so that any process can read any
of them, and counts whatever else is there.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from gigatok_ds.data.folder import (
    ImageFolder,
    class_order,
    holds_images,
    images_below,
    is_image,
    scan_image_folder,
    why_no_image,
)
from gigatok_ds.errors import InputError
from gigatok_ds.file_kinds import is_compressed_tar, is_tar
from gigatok_ds.packing.chunked_source import chunked_source, is_chunked
from gigatok_ds.packing.label_files import read_labels
from gigatok_ds.packing.listing import ImageSource, SourceImage, numbered_key
from gigatok_ds.packing.parquet_files import parquet_files
from gigatok_ds.packing.parquet_source import parquet_source
from gigatok_ds.packing.shard_source import shard_source
from gigatok_ds.shards.tar_members import FILE, Member, tar_members
from gigatok_ds.shards.tar_scan import IMAGE_EXTENSIONS, NO_LABEL
from gigatok_ds.untrusted import reading

_SYNSET_TAR = re.compile(r"n\d{8}\.tar", re.IGNORECASE)
LISTS = (".txt", ".lst", ".list")  # of paths
IMAGENET = {"train": (1000, 1_281_167), "val": (1000, 50_000)}  # classes and images


def open_source(path: str | Path, labels: str | Path | None = None, *, field: str | None = None,
                unlabelled: bool = False) -> ImageSource:
    """The images of a directory (classes, shards, MDS, litdata, Parquet files, or ImageNet's nNNNNNNNN.tar files), of
    one of ImageNet's tars, of a Parquet file, or of a text file with the path of an image in each line.

    labels: which class each image of a source without classes has; see `read_labels`. field: the column of labels in
    MDS, litdata and Parquet files, in a table that `labels` is, or the field of each sample's KEY.json in shards.
    unlabelled: images have no labels, whatever directories they lie in. Raises InputError when there is nothing to
    read, or labels are missing or do nothing.
    """
    if unlabelled and (labels is not None or field is not None):
        raise InputError(f"--no-labels and {'--labels' if labels is not None else '--label-field'} say different "
                         "things; leave one of them out")
    path = Path(path)
    source = _opened(path, labels, field, unlabelled)
    return source.without_labels() if unlabelled else source


def _opened(path: Path, labels: str | Path | None, field: str | None, unlabelled: bool) -> ImageSource:
    if path.is_dir() and any(is_tar(child.name) or is_compressed_tar(child.name) for child in path.iterdir()
                             if "devkit" not in child.name):
        return _directory_of_tars(path, labels, field)
    if path.suffix == ".parquet" or (path.is_dir() and not holds_images(path) and parquet_files(path)):
        _refuse(labels, f"{path} has a column of labels, which --label-field names")
        return parquet_source(path, field)
    if is_chunked(path):
        _refuse(labels, f"{path} has a column of labels, which --label-field names")
        return chunked_source(path, field)
    if field is not None and labels is None:
        raise InputError(f"--label-field is for shards, MDS, litdata, Parquet files and tables (--labels); {path} is "
                         "none of them")
    if path.is_dir():
        return _directory_of_images(path, labels, field, unlabelled)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a directory of images or shards, or one of ImageNet's tars")
    if path.suffix in LISTS:
        return _of_paths(listed_images(path), Counter(), path, labels, field, unlabelled)
    return _tar(path, labels, field, unlabelled)


def _refuse(labels: str | Path | None, reason: str) -> None:
    if labels is not None:
        raise InputError(f"--labels goes with images without classes; {reason}")


def listed_images(path: Path) -> list[Path]:
    """The paths that a text file has in its lines, relative to its own directory. InputError for one that is no image.
    """
    with reading(path, "give a text file in UTF-8 with the path of an image in each line"):
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    paths = [path.parent / line for line in lines if line]
    for number, file in enumerate(paths, 1):
        if not is_image(file.name) or not file.is_file():
            raise InputError(f"{path}, image {number}: {file} is not there, or its name is not that of an image "
                             f"({', '.join(IMAGE_EXTENSIONS)})")
    return paths


def _tar(path: Path, labels: str | Path | None, field: str | None, unlabelled: bool) -> ImageSource:
    members = list(tar_members(path))
    inner = [member for member in members if member.kind == FILE and is_tar(_base(member))]
    packed = [member for member in members if is_compressed_tar(_base(member))]
    if packed:
        raise InputError(
            f"{path} holds {packed[0].name}, which is compressed ({len(packed)} such members); decompress them"
        )
    if not inner:
        return _labelled_tar(path, members, labels, field, unlabelled)
    _refuse(labels, f"{path} has classes, leave it out")
    beside = Counter(f"{_why(member) or 'images'} beside the classes' tars" for member in members if member
                     not in inner)
    return _class_tars([(path, member.offset, member.size, member.name) for member in inner], beside)


def _directory_of_tars(path: Path, labels: str | Path | None, field: str | None) -> ImageSource:
    tars = sorted(child for child in path.iterdir() if is_tar(child.name))
    packed = sorted(child.name for child in path.iterdir() if is_compressed_tar(child.name) and "devkit"
                    not in child.name)
    if packed:
        raise InputError(
            f"{path / packed[0]} is compressed ({len(packed)} such files there); decompress it, or move it away"
        )
    if not all(_SYNSET_TAR.fullmatch(tar.name) for tar in tars):
        return shard_source(path, labels, field)
    _refuse(labels, f"{path} is a directory of tars that say their classes, leave it out")
    if field is not None:
        raise InputError(f"--label-field does nothing for {path}, whose tars are named after their classes; leave it "
                         "out")
    beside = Counter(why_no_image(child.name) for child in path.iterdir() if child not in tars)
    return _class_tars([(tar, 0, tar.stat().st_size, tar.name) for tar in tars], beside)


def _directory_of_images(path: Path, labels: str | Path | None, field: str | None, unlabelled: bool) -> ImageSource:
    if labels is not None or unlabelled:
        left_out: Counter = Counter()
        return _of_paths(images_below(path, left_out), left_out, path, labels, field, unlabelled)
    folder = scan_image_folder(path)
    if folder.flat:
        raise InputError(
            f"{path} holds {len(folder.paths)} images and no directories of classes; give --labels (a file with "
            "a line NAME CLASS for each, Kaggle's LOC_val_solution.csv, or ImageNet's devkit), put the images "
            "of each class into a directory of its own, or, for a tokenizer, --no-labels"
        )
    return _of_files(folder)


def _of_paths(paths: list[Path], left_out: Counter, origin: Path, labels: str | Path | None, field: str | None,
              unlabelled: bool) -> ImageSource:
    """Files that do not say their classes."""
    if not paths:
        raise InputError(f"no images under {origin}")
    if unlabelled:
        return _of_files(ImageFolder(paths=paths, labels=[NO_LABEL] * len(paths), classes=[], left_out=left_out))
    if labels is None:
        raise InputError(f"{origin} does not say which class its images have; give --labels (a text file with a line "
                         "NAME CLASS for each) or, for a tokenizer, --no-labels")
    root = origin if origin.is_dir() else origin.parent
    names = [os.path.relpath(file, root) for file in paths]
    classes, numbers, notes = _numbered_classes(labels, names, field)
    folder = ImageFolder(paths=paths, labels=numbers, classes=classes, left_out=left_out)
    return _of_files(folder, (*notes, *_unlike_imagenet("val", paths[0].name, classes, len(paths))))


def _of_files(folder: ImageFolder, notes: Sequence[str] = ()) -> ImageSource:
    images = [SourceImage(numbered_key(number, file.stem), label, str(file))
              for number, (file, label) in enumerate(zip(folder.paths, folder.labels, strict=True))]
    return ImageSource(images=images, classes=folder.classes, left_out=folder.left_out, notes=notes)


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


def _labelled_tar(path: Path, members: list[Member], labels: str | Path | None, field: str | None,
                  unlabelled: bool) -> ImageSource:
    left_out: Counter = Counter()
    found = _images(members, left_out)
    if not found:
        raise InputError(f"{path} holds neither images nor tars of images")
    if unlabelled:
        images = [_image(number, member, NO_LABEL, path) for number, member in enumerate(found)]
        return ImageSource(images=images, classes=[], left_out=left_out)
    if labels is None:
        raise InputError(f"{path} does not say which class its images have; give --labels: "
                         "ILSVRC2012_devkit_t12.tar.gz, or a text file with a line NAME CLASS for each; or, for a "
                         "tokenizer, --no-labels")
    classes, numbers, notes = _numbered_classes(labels, [member.name for member in found], field)
    images = [_image(number, member, label, path)
              for number, (member, label) in enumerate(zip(found, numbers, strict=True))]
    return ImageSource(images=images, classes=classes, left_out=left_out,
                  notes=(*notes, *_unlike_imagenet("val", _base(found[0]), classes, len(images))))


def _numbered_classes(labels: str | Path, names: list[str],
                      field: str | None) -> tuple[list[str], list[int], list[str]]:
    """(class names, the number of each image's class, lines for the user)."""
    class_of, notes = read_labels(labels, names, field)
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
    key = numbered_key(number, Path(member.name).stem)
    return SourceImage(key, label, str(path), member.offset, member.size, member.name)
