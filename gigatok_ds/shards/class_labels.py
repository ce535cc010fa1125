"""Labels of data that number their classes otherwise: what counts is what a class is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gigatok_ds.errors import InputError


def renumbered(labels: np.ndarray, names: Sequence[str], classes: Sequence[str], location: str | Path,
               source: str | Path) -> np.ndarray:
    """Labels (N,), positions in `names`, as positions of the same names in `classes`; see `ShardIndex.number_as`."""
    if not names or not classes or names == classes:
        return labels
    used = sorted({int(label) for label in np.unique(labels) if 0 <= label < len(names)})
    unknown = [names[label] for label in used if names[label] not in classes]
    if unknown:
        raise InputError(f"{location} has a class {unknown[0]!r} ({len(unknown)} such) that {source} does not have; "
                         "give data of the same classes")
    if twice := next((names[label] for label in used if classes.count(names[label]) + names.count(names[label]) > 2),
                     None):
        raise InputError(f"there are two classes called {twice!r} in {location} or {source}, so names do not tell "
                         "which is which; name them apart")
    number = {name: position for position, name in enumerate(classes)}
    position = np.arange(max(len(names), int(labels.max()) + 1), dtype=labels.dtype)
    position[used] = [number[names[label]] for label in used]
    return np.where(labels >= 0, position[labels], labels)
