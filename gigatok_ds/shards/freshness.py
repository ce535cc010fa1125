"""Whether tars are still what their index describes, as far as it can be told without reading them whole.

Labels that were changed in place change neither sizes nor the images, so neither would tell.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np

from gigatok_ds.errors import InputError
from gigatok_ds.shards.class_labels import StoredLabels
from gigatok_ds.shards.shard_files import REBUILD
from gigatok_ds.shards.tar_scan import stored_labels

_SAMPLED_TARS, _SAMPLED = 16, 4  # so many labels of each of so many tars are compared at every start

logger = logging.getLogger(__name__)


def check_fresh(directory: Path, index: Path, names: list[str], table: dict[str, np.ndarray],
                classes: list[str]) -> None:
    """Compare the labels of tars in a directory that are newer than the file `index` with it, and a few labels of
    others.

    `table` holds the samples of the tars of these names, and `classes` their classes' names. Raises InputError, naming
    tar and sample, for a label that is not what was indexed.
    """
    indexed_at = index.stat().st_mtime_ns
    newer = {name for name in names if (directory / name).stat().st_mtime_ns > indexed_at}
    if newer:
        logger.warning("%s: %d tars are newer than the index, so their labels are compared with it", directory,
                       len(newer))
    sampled = set(names[:: -(-len(names) // _SAMPLED_TARS)])
    for number, name in enumerate(names):
        if name in newer or name in sampled:
            rows = np.flatnonzero(table["shard"] == number)
            _compare(directory / name, index,
                     {key: int(label) for key, label in zip(table["key"][rows], table["label"][rows], strict=True)},
                     None if name in newer else _SAMPLED, StoredLabels(classes) if classes else None)
    if newer:
        with suppress(OSError):  # the next start need not look again
            os.utime(index)


def _compare(path: Path, index: Path, indexed: dict[bytes, int], most: int | None,
             labels: StoredLabels | None) -> None:
    for key, label in islice(stored_labels(path, labels), most):
        if indexed.get(key.encode(), label) != label:
            raise InputError(f"{path} has changed since it was indexed: the label of sample {key!r} is {label}, not "
                             f"{indexed[key.encode()]}; {REBUILD} (in {index.parent})")
