"""What a source of images lists: where each of them lies, what class it has, and what is said of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from gigatok_ds.data.folder import class_order
from gigatok_ds.errors import InputError
from gigatok_ds.packing.parquet_files import read_image
from gigatok_ds.shards.tar_scan import NO_LABEL, safe_key

_KEY_NAME = 20  # characters of a file name in a key
_LARGEST = 999_999_999  # class number, as of KEY.cls


class SourceImage(NamedTuple):
    """One encoded image: `size` bytes at `offset` of the file `path` (size None: the whole file), or in a row of a
    Parquet file. Its label is a position in the source's classes, or NO_LABEL.
    """

    key: str
    label: int
    path: str
    offset: int = 0
    size: int | None = None
    member: str | None = None  # its name in the tar
    caption: tuple[int, int] | None = None  # offset and size of the text that goes with it, in the same file
    row: int | None = None

    @property
    def name(self) -> str:
        """What error messages call it."""
        if self.row is not None:
            return f"{self.path}: row {self.row}"
        return f"{self.path}: {self.member}" if self.member else self.path

    def read(self) -> bytes:
        if self.row is not None:
            return read_image(self.path, self.row)
        return self._part(self.offset, self.size)

    def read_caption(self) -> bytes | None:
        return self._part(*self.caption) if self.caption else None

    def _part(self, offset: int, size: int | None) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(offset)
            data = file.read() if size is None else file.read(size)
        if size is not None and len(data) != size:
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

    def without_labels(self) -> ImageSource:
        return replace(self, images=[image._replace(label=NO_LABEL) for image in self.images], classes=[])

    @property
    def has_labels(self) -> bool:
        return any(image.label != NO_LABEL for image in self.images)


def numbered_key(number: int, stem: str) -> str:
    """The number keeps keys unique; the (shortened) name lets a person find the file again."""
    return f"{number:08d}_{safe_key(stem)[:_KEY_NAME]}"


def numbered_labels(values: list, classes: list[str], source: str) -> tuple[list[int], list[str]]:
    """Labels, and class names: values that are numbers are labels of `classes`, names become classes in the order of
    the alphabet; None stands for no label.
    """
    known = [value for value in values if value is not None]
    if all(isinstance(value, int) and not isinstance(value, bool) for value in known):
        if (most := max(known, default=0)) > _LARGEST:
            raise InputError(f"{source} has a label {most}; class numbers are {_LARGEST} at most")
        return [NO_LABEL if value is None or value < 0 else value for value in values], classes
    names, number = class_order([str(value) for value in known], source)
    return [NO_LABEL if value is None else number[str(value)] for value in values], names
