"""Tars of this host without an index beside them: read once, by one process, and the index is kept where there is room.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from gigatok_ds.errors import InputError
from gigatok_ds.file_kinds import is_tar
from gigatok_ds.shards.contents import INDEX_FILE, Contents, load_index, write_index
from gigatok_ds.shards.freshness import check_fresh
from gigatok_ds.shards.index import ShardIndex, scan_shards
from gigatok_ds.shards.patterns import local_tars
from gigatok_ds.shards.sample_table import SampleTable
from gigatok_ds.shards.shard_cache import ShardCache, locked
from gigatok_ds.shards.shard_files import LocalFiles

logger = logging.getLogger(__name__)


def open_local(location: str | Path, extensions: tuple[str, ...], cache: ShardCache, *, max_bad_fraction: float,
               compare: bool) -> ShardIndex:
    """The samples of a directory, a single tar or a pattern of tars of one directory.

    An index in the directory is used. Without one, and of a part of a directory, an index is made by one process of the
    host while the others wait, and kept in the directory or, if that cannot be written or only a part is read, in the
    cache. Raises what `ShardIndex.open` raises.
    """
    tars = local_tars(location)
    directory = next(iter(tars.values())).parent if tars else Path(location)
    if not tars and (not directory.is_dir() or (directory / INDEX_FILE).is_file()):
        return ShardIndex.open(directory, extensions, max_bad_fraction=max_bad_fraction, compare=compare)
    try:
        kept = cache.directory(str(Path(location).resolve()))
    except OSError as error:
        if tars:
            raise InputError(
                f"{cache.root} cannot be written ({error.strerror}), where the index of {location} would be "
                "kept; set XDG_CACHE_HOME to a directory that you may write to"
            ) from None
        return ShardIndex.open(directory, extensions, max_bad_fraction=max_bad_fraction, compare=compare)
    with locked(kept / "index.lock"):
        if not tars and (directory / INDEX_FILE).is_file():  # by another process, while this one waited
            return ShardIndex.open(directory, extensions, max_bad_fraction=max_bad_fraction, compare=compare)
        names = list(tars) or sorted(path.name for path in directory.iterdir() if is_tar(path.name))
        contents = _kept(kept, directory, names, compare) or _of_part(directory, tars)
        if contents is None:
            contents = _made(kept, directory, names, extensions, max_bad_fraction, bool(tars))
    contents.check_problems(max_bad_fraction)
    return ShardIndex(LocalFiles(directory, kept if (kept / INDEX_FILE).is_file() else directory), contents)


def _kept(kept: Path, directory: Path, names: list[str], compare: bool) -> Contents | None:
    """What the cache has, if it is of these tars."""
    if not (kept / INDEX_FILE).is_file():
        return None
    try:
        contents = load_index(kept)
    except InputError as error:
        logger.warning("the index of %s in %s is damaged (%s); it is made again", directory, kept, error)
        return None
    there = {name: (directory / name).stat() for name in names}
    if [(shard.name, shard.size) for shard in contents.shards] != [(name, status.st_size) for name, status
                                                                   in there.items()]:
        logger.warning("%s: the tars have changed since they were indexed in %s, and are indexed again", directory,
                       kept)
        return None
    if compare:
        check_fresh(directory, kept / INDEX_FILE, contents, [status.st_mtime_ns for status in there.values()])
    return contents


def _of_part(directory: Path, tars: dict[str, Path]) -> Contents | None:
    """What an index in the directory says of some of its tars."""
    if not tars or not (directory / INDEX_FILE).is_file():
        return None
    full = load_index(directory)
    number = {shard.name: position for position, shard in enumerate(full.shards)}
    if not tars.keys() <= number.keys():
        return None
    shards = [full.shards[number[name]] for name in tars]
    if shards == full.shards:
        return full
    ends = np.cumsum(full.table.counts)
    places = [number[name] for name in tars]
    rows: slice | np.ndarray = slice(int(ends[places[0]] - full.table.counts[places[0]]), int(ends[places[-1]]))
    if places != list(range(places[0], places[-1] + 1)):  # else a view of what is mapped
        rows = np.concatenate([np.arange(ends[place] - full.table.counts[place], ends[place]) for place in places])
    columns = {name: column[rows] for name, column in full.table.stored().items()}
    return Contents(shards, full.classes, SampleTable(columns, [shard.samples for shard in shards]), full.problems)


def _made(kept: Path, directory: Path, names: list[str], extensions: tuple[str, ...], max_bad_fraction: float,
          part: bool) -> Contents:
    if not names:
        raise InputError(f"{directory} holds no shards: looked for uncompressed *.tar files")
    logger.warning("%s has no index of its %d tars: they are read once, while other processes of this host wait",
                   directory, len(names))
    contents = scan_shards(LocalFiles(directory), names, extensions, max_bad_fraction)
    if not part and (directory / INDEX_FILE).is_file():  # by another host, whose processes have mapped it
        return load_index(directory)
    try:
        write_index(kept if part else directory, contents)
    except OSError as error:
        logger.warning("%s cannot be written (%s); the index is kept in %s", directory, error, kept)
        write_index(kept, contents)
        return load_index(kept)
    return load_index(kept if part else directory)  # mapped, as for the others
