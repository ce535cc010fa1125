"""What the label of a sample means: its members KEY.cls, and classes that other data number otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from gigatok_ds.errors import InputError

_LONGEST_NAME = 200  # bytes


class StoredLabels:
    """The numbers that members KEY.cls of a set of tars stand for: themselves, or those of class names.

    Of names that are not `known`, which of both is meant is settled when all are seen: until then a name has a number
    from FIRST_NAME on, in the order in which they are met.
    """

    FIRST_NAME = 2**30

    def __init__(self, known: Sequence[str] = ()):
        self._known = {name: number for number, name in enumerate(known)}
        self._met: dict[str, int] = {}
        self._has_numbers = False

    def number(self, data: bytes) -> int | None:
        """What the contents of a member stand for; None if they can be no label."""
        text = data.strip()
        if re.fullmatch(rb"-?[0-9]{1,9}", text):
            self._has_numbers = True
            return int(text)
        name = text.decode(errors="replace")
        if self._known:
            return self._known.get(name)
        if len(text) > _LONGEST_NAME or not name.isprintable() or not any(map(str.isalpha, name)):
            return None
        return self._met.setdefault(name, self.FIRST_NAME + len(self._met))

    def settle(self, labels: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Class names in the order of the alphabet, and labels (N,) as positions in them; or, where there are numbers,
        no names, and labels that are names as they were.
        """
        if self._has_numbers or not self._met:
            return [], labels
        classes = sorted(self._met)
        place = {name: number for number, name in enumerate(classes)}
        places = np.array([place[name] for name in self._met], labels.dtype)
        return classes, np.where(labels < self.FIRST_NAME, labels, places[labels % self.FIRST_NAME % len(places)])

    def name(self, label: int) -> str:
        """What was met with a number from FIRST_NAME on."""
        return list(self._met)[label - self.FIRST_NAME]


def numbering(used: Iterable[int], names: Sequence[str], classes: Sequence[str], location: str | Path,
              source: str | Path) -> np.ndarray | None:
    """The position in `classes` of each class of `names` that a label in `used` is of (C,), for `renumbered`;
    None where both are the same, or one of both names no classes. See `ShardIndex.number_as`.
    """
    if not names or not classes or names == classes:
        return None
    used = sorted(label for label in used if 0 <= label < len(names))
    unknown = [names[label] for label in used if names[label] not in classes]
    if unknown:
        raise InputError(f"{location} has a class {unknown[0]!r} ({len(unknown)} such) that {source} does not have; "
                         "give data of the same classes")
    if twice := next((names[label] for label in used if classes.count(names[label]) + names.count(names[label]) > 2),
                     None):
        raise InputError(f"there are two classes called {twice!r} in {location} or {source}, so names do not tell "
                         "which is which; name them apart")
    number = {name: position for position, name in enumerate(classes)}
    position = np.arange(len(names), dtype=np.int32)
    position[used] = [number[names[label]] for label in used]
    return position


def renumbered(labels: np.ndarray, position: np.ndarray | None) -> np.ndarray:
    """`position[label]` of the labels (N,) that it has (C,), the others as they are; all of them as they are without
    it.
    """
    if position is None:
        return labels
    known = (labels >= 0) & (labels < len(position))
    return np.where(known, position[np.where(known, labels, 0)], labels).astype(labels.dtype, copy=False)
