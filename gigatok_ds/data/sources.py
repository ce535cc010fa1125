"""Images to be packed into shards, wherever they lie: a folder, ImageNet's own tars read without unpacking, or shards.

A source lists its images in a fixed order, with the byte range of each in its file, so that any process can read any
of them.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from gigatok_ds.data.folder import is_image, scan_image_folder
from gigatok_ds.data.index import ShardIndex
from gigatok_ds.data.tar_scan import check_end, safe_key
from gigatok_ds.errors import InputError

_SYNSET_TAR = re.compile(r"n\d{8}\.tar")
_KEY_NAME = 20  # characters of a file name in a key


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
class Source:
    """`images` in their order; the label of each is a position in `classes`, which is empty when names are unknown."""

    images: list[SourceImage]
    classes: list[str]


def open_source(path: str | Path, labels: str | Path | None = None) -> Source:
    """The images of a directory (classes, shards, or ImageNet's nNNNNNNNN.tar files) or of one of ImageNet's tars.

    `labels` says which class each image of ILSVRC2012_img_val.tar has; see `read_labels`. Raises InputError when there
    is nothing to read, or labels are missing or do nothing.
    """
    path = Path(path)
    if path.is_dir():
        tars = sorted(child for child in path.glob("*.tar") if not child.name.startswith("."))
        if labels is not None:
            raise InputError(f"--labels goes with a tar of images without classes; {path} is a directory, leave it out")
        if not tars:
            return _folder(path)
        if all(_SYNSET_TAR.fullmatch(tar.name) for tar in tars):
            return _class_tars([(tar, 0, tar.stat().st_size, tar.name) for tar in tars])
        return _shards(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a directory of images or shards, or one of ImageNet's tars")
    members = list(_members(path, 0, path.stat().st_size, path.name))
    inner = [member for member in members if member.name.endswith(".tar")]
    if inner:
        if labels is not None:
            raise InputError(f"--labels goes with a tar of images without classes; {path} has classes, leave it out")
        return _class_tars([(path, member.offset, member.size, member.name) for member in inner])
    return _labelled_tar(path, members, labels)


def _folder(path: Path) -> Source:
    folder = scan_image_folder(path)
    images = [SourceImage(_numbered(number, file.stem), label, str(file))
              for number, (file, label) in enumerate(zip(folder.paths, folder.labels, strict=True))]
    return Source(images=images, classes=folder.classes)


def _shards(path: Path) -> Source:
    index = ShardIndex.open(path)
    images = []
    for i in range(len(index)):
        name, offset, size = index.place(i)
        images.append(SourceImage(index.key(i), index.label(i), str(path / name), offset, size, index.key(i)))
    return Source(images=images, classes=index.classes)


class _Member(NamedTuple):
    name: str
    offset: int  # in the outermost file
    size: int


def _members(path: Path, offset: int, size: int, name: str) -> Iterator[_Member]:
    """The plain files of a tar that lies at a place of a file. InputError when it is damaged."""
    end = 0
    with open(path, "rb") as file:
        part = _Part(file, offset, size)
        try:
            with tarfile.open(fileobj=part, mode="r:") as tar:
                for member in tar:
                    if member.isreg() and not member.issparse():
                        yield _Member(member.name, offset + member.offset_data, member.size)
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        except tarfile.TarError as error:
            raise InputError(f"{path}: {name} is not a whole uncompressed tar ({error}); copy it again") from None
        check_end(part, end, f"{path}: {name}")


class _Part(io.RawIOBase):
    """A byte range of a file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self.file, self.start, self.size, self.position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer) -> int:
        wanted = max(0, min(len(buffer), self.size - self.position))
        data = os.pread(self.file.fileno(), wanted, self.start + self.position)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _class_tars(tars: list[tuple[Path, int, int, str]]) -> Source:
    """Tars of one class each, named after it: (file, offset, size, name)."""
    tars = sorted(tars, key=lambda tar: Path(tar[3]).name)
    classes = [Path(name).stem for _, _, _, name in tars]
    if len(set(classes)) < len(classes):
        raise InputError(f"{tars[0][0]}: two tars have the same class name")
    images: list[SourceImage] = []
    for label, (path, offset, size, name) in enumerate(tqdm(tars, desc="reading", unit="class", disable=None)):
        found = sorted(member for member in _members(path, offset, size, name) if is_image(Path(member.name).name))
        if not found:
            raise InputError(f"{path}: {name} holds no images")
        images += [_image(len(images) + number, member, label, path) for number, member in enumerate(found)]
    return Source(images=images, classes=classes)


def _labelled_tar(path: Path, members: list[_Member], labels: str | Path | None) -> Source:
    found = sorted(member for member in members if is_image(Path(member.name).name))
    if not found:
        raise InputError(f"{path} holds neither images nor tars of images")
    if labels is None:
        raise InputError(f"{path} does not say which class its images have; give --labels: "
                         "ILSVRC2012_devkit_t12.tar.gz, or a text file with a line NAME CLASS for each")
    class_of = read_labels(labels, [Path(member.name).name for member in found])
    classes = sorted(set(class_of.values()))
    position = {name: label for label, name in enumerate(classes)}
    images = [_image(number, member, position[class_of[Path(member.name).name]], path)
              for number, member in enumerate(found)]
    return Source(images=images, classes=classes)


def read_labels(path: str | Path, names: list[str]) -> dict[str, str]:
    """The class name of each of the sorted file names.

    `path` is ImageNet's ILSVRC2012_devkit_t12.tar.gz, which gives the validation images' classes in the order of their
    names, or a text file with a line `NAME CLASS` for each image. Raises InputError when an image has no class.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--labels: {path} does not exist")
    if path.name.endswith((".tar.gz", ".tgz")):
        return dict(zip(names, _devkit_classes(path, len(names)), strict=True))
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.split()
        if len(words) not in (0, 2):
            raise InputError(f"{path}, line {number}: {line[:60]!r} is not of the form NAME CLASS")
        found |= [tuple(words)] if words else []
    lacking = [name for name in names if name not in found]
    if lacking:
        raise InputError(f"{path} has no line for {lacking[0]} ({len(lacking)} such of {len(names)} images)")
    return {name: found[name] for name in names}


def _devkit_classes(path: Path, count: int) -> list[str]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError("reading ImageNet's devkit needs scipy; pip install scipy") from None
    wanted = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isreg() and name in wanted:
                    found[name] = tar.extractfile(member).read()
        synsets = loadmat(io.BytesIO(found[wanted[0]]), squeeze_me=True)["synsets"]
        names = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        classes = [names[int(line)] for line in found[wanted[1]].split()]
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, KeyError, ValueError, IndexError, TypeError) as error:
        raise InputError(f"{path} is not ImageNet's devkit ({type(error).__name__}: {error})") from None
    if len(classes) != count:
        raise InputError(f"{path} gives the classes of {len(classes)} images; there are {count}")
    return classes


def _image(number: int, member: _Member, label: int, path: Path) -> SourceImage:
    key = _numbered(number, Path(member.name).stem)
    return SourceImage(key, label, str(path), member.offset, member.size, member.name)


def _numbered(number: int, stem: str) -> str:
    """The number keeps keys unique; the (shortened) name lets a person find the file again."""
    return f"{number:08d}_{safe_key(stem)[:_KEY_NAME]}"
