"""Whether tars are still what their index describes, as far as it can be told without reading them whole.

Labels that were changed in place change neither sizes nor the images, so neither would tell.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from gigatok_ds.errors import InputError
from gigatok_ds.shards.class_labels import StoredLabels
from gigatok_ds.shards.contents import Contents
from gigatok_ds.shards.shard_files import REBUILD
from gigatok_ds.shards.tar_scan import stored_labels

_SAMPLED_TARS, _SAMPLED = 16, 4  # so many labels of each of so many tars are compared at every start

logger = logging.getLogger(__name__)


def check_fresh(directory: Path, index: Path, contents: Contents, changed: Sequence[int]) -> None:
    """Compare the labels of tars in a directory that are newer than the file `index` with it, and a few labels of
    others.

    `contents` are what it says of the tars, and `changed` when each was changed, in nanoseconds. Raises InputError,
    naming tar and sample, for a label that is not what was indexed.
    """
    indexed_at, names = index.stat().st_mtime_ns, [shard.name for shard in contents.shards]
    newer = {name for name, when in zip(names, changed, strict=True) if when > indexed_at}
    if newer:
        logger.warning("%s: %d tars are newer than the index, so their labels are compared with it", directory,
                       len(newer))
    sampled = set(names[:: -(-len(names) // _SAMPLED_TARS)])
    table, end = contents.table, 0
    for name, samples in zip(names, table.counts.tolist(), strict=True):
        first, end = end, end + samples
        if name in newer or name in sampled:
            labels = table.labels(slice(first, end)).tolist()
            indexed = dict(zip(map(table.key, range(first, end)), labels, strict=True))
            _compare(directory / name, index, indexed,
                     None if name in newer else _SAMPLED, StoredLabels(contents.classes) if contents.classes else None)
    if newer:
        with suppress(OSError):  # the next start need not look again
            os.utime(index)


def _compare(path: Path, index: Path, indexed: dict[bytes, int], most: int | None,
             labels: StoredLabels | None) -> None:
    for key, label in islice(stored_labels(path, labels), most):
        if indexed.get(key.encode(), label) != label:
            raise InputError(f"{path} has changed since it was indexed: the label of sample {key!r} is {label}, not "
                             f"{indexed[key.encode()]}; {REBUILD} (in {index.parent})")
