"""Shards that are not in a directory of this host: copied, tar by tar, into a cache when they are first needed.

A location is the URL of a directory (s3://, gs://, https://, whatever fsspec knows), a pattern of tars
(https://host/train-{000000..000146}.tar), or a command that writes one to its output, as a pattern, too
(pipe:curl -sf https://host/train-{000000..000146}.tar).
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fcntl import LOCK_EX, LOCK_SH, flock
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from gigatok_ds.cluster.launched import launched_rank_or_alone
from gigatok_ds.config.location import is_remote, masked
from gigatok_ds.errors import InputError
from gigatok_ds.files import is_scratch_of, write_atomically, written_aside
from gigatok_ds.npy_files import ARRAY_BYTES
from gigatok_ds.shards.contents import INDEX_FILE, TABLE_FILE, Contents, TarShard, load_index, write_index
from gigatok_ds.shards.index import ShardIndex, scan_shards
from gigatok_ds.shards.local_shards import open_local
from gigatok_ds.shards.patterns import expanded, local_tars, names_tars
from gigatok_ds.shards.shard_cache import ShardCache, lock_of, locked
from gigatok_ds.shards.tar_scan import IMAGE_EXTENSIONS
from gigatok_ds.transport.http_client import OtherPart
from gigatok_ds.transport.transports import (
    Missing,
    Unreachable,
    beside,
    check_end,
    persistently,
    read_all,
    transport_of,
)
from gigatok_ds.untrusted import JSON_BYTES

_FEW = 2  # attempts where there is an earlier copy to go on with
_AT_ONCE = 16  # tars whose sizes are asked for
_CHUNK = 2**20
_CHECKED = "checked-by-job"
_TRUSTED = 600.0  # seconds

T = TypeVar("T")

logger = logging.getLogger(__name__)


def open_shards(location: str | Path, extensions: tuple[str, ...] = IMAGE_EXTENSIONS,
                cache: ShardCache | None = None, *, max_bad_fraction: float = 0.0, compare: bool = True) -> ShardIndex:
    """The samples of a directory or tars of this host (`open_local`), or of any other location, see above.

    `cache` is for the copies of the latter, and for indexes (None: the default).

    The index beside remote tars is used if there is one; otherwise all of them are fetched once and indexed, by one
    process of this host, and the index stays in the cache. `compare` is that of `ShardIndex.open`. Raises InputError
    when the location cannot be read, or its tars are not those that were indexed, and what `ShardIndex.open` raises.
    """
    if not is_remote(location):
        index = open_local(location, extensions, cache or ShardCache(), max_bad_fraction=max_bad_fraction,
                           compare=compare)
        index.patience = (cache or ShardCache()).patience
        return index
    tars = RemoteTars.at(location, cache)
    with locked(tars.directory / "index.lock") as lock:
        if not _checked_by_this_job(tars):
            _bring_up_to_date(tars, extensions, max_bad_fraction)
            write_atomically(tars.directory / _CHECKED, _job().encode())
        flock(lock, LOCK_SH)  # others of this host read it at the same time
        contents = _kept_index(tars)
    contents.check_problems(max_bad_fraction)
    if warning := tars.cache.check_room(tars.location, contents.shards):
        logger.warning("%s", warning)
    index = ShardIndex(tars, contents)
    index.patience = tars.cache.patience
    return index


def read_beside(location: str | Path, name: str, cache: ShardCache | None = None) -> bytes | None:
    """A small file of a directory of shards, None if it is not there. A pattern of tars has none."""
    if not is_remote(location):
        path = Path(location) / name
        return path.read_bytes() if path.is_file() else None
    tars = RemoteTars.at(location, cache)
    data, path = tars.published(name), tars.directory / name
    if data is not None and not (path.is_file() and path.read_bytes() == data):
        write_atomically(path, data)
    return data


def check_data(setting: str, location: str, extensions: tuple[str, ...], cache: ShardCache, *,
               max_bad_fraction: float = 0.0) -> None:
    """Refuse a setting whose directory is missing. A remote location is indexed already, while no rank waits for us."""
    if is_remote(location):
        open_shards(location, extensions, cache, max_bad_fraction=max_bad_fraction)
    elif not Path(location).is_dir() and not names_tars(location):
        raise InputError(f"{setting} is {location}, which is not a directory")
    else:
        local_tars(location)


def short_name(location: str | Path) -> str:
    """The last part of a location, without what may be secret in a URL."""
    if not is_remote(location):
        return Path(location).resolve().name
    return masked(location).partition("?")[0].rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class RemoteTars:
    """The tars of a remote location, as ShardFiles: `urls` by file name, or nothing of a directory."""

    source: str
    urls: dict[str, str]
    cache: ShardCache
    directory: Path  # of the copies

    @classmethod
    def at(cls, location: str, cache: ShardCache | None) -> RemoteTars:
        location = location if location.startswith("pipe:") else location.rstrip("/")
        cache = ShardCache() if cache is None else cache
        return cls(location, expanded(location), cache, cache.directory(location))

    @property
    def location(self) -> str:
        """The location as messages have it."""
        return masked(self.source)

    @property
    def advice(self) -> str:
        return f"if that is right, remove {self.directory} to fetch and index the shards again"

    @property
    def transient(self) -> bool:
        return self.cache.limit is not None

    def name(self, tar: str) -> str:
        return masked(self.url(tar))

    def url(self, tar: str) -> str:
        return self.urls[tar] if self.urls else beside(self.source, tar)

    def persistently(self, action: Callable[[], T], name: str, attempts: int | None = None) -> T:
        return persistently(action, name, patience=self.cache.patience, attempts=attempts)

    @contextmanager
    def held(self, tar: str, expected: TarShard | None = None) -> Iterator[Path]:
        path = self.directory / tar
        with locked(lock_of(path), LOCK_SH) as lock:
            while not path.exists():
                flock(lock, LOCK_EX)  # gives the shared lock away first, so look again
                if not path.exists():
                    self._fetch(path, expected)
                flock(lock, LOCK_SH)
            with suppress(PermissionError):  # another user's copy
                os.utime(path)
            try:
                yield path
            except InputError as error:
                if expected is not None:
                    raise
                path.unlink(missing_ok=True)  # a copy that cannot be indexed is no use
                raise InputError(str(error).replace(str(path), self.name(tar))) from None

    def sizes(self, attempts: int | None = None) -> dict[str, int | None]:
        """The names of the remote tars in their order, and their sizes if those can be known without reading them."""
        transport = transport_of(self.source)
        if not self.urls:
            listed = self.persistently(lambda: transport.tars(self.source), self.source, attempts)
            found = {name: listed[name] for name in sorted(listed) if not name.startswith(".")}
            if not found:
                raise InputError(f"{self.location} lists no shards: looked for uncompressed *.tar files; where there "
                                 "are no listings, give a pattern, such as .../train-{000000..000146}.tar")
        else:
            found = dict.fromkeys(self.urls)
        unknown = {name: self.url(name) for name, size in found.items() if size is None}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            asked = pool.map(lambda url: self.persistently(lambda: transport.size(url), url, attempts),
                             unknown.values())
            return found | dict(zip(unknown, asked, strict=True))

    def published(self, name: str) -> bytes | None:
        """A small file of the remote directory, or its earlier copy when that cannot be reached."""
        if self.urls:
            return None
        url, copy = self.url(name), self.directory / name
        try:
            return self.read(url, _FEW if copy.is_file() else None)
        except Missing:
            return None
        except Unreachable as error:
            if not copy.is_file():
                raise
            logger.warning("%s; going on with the copy in %s", error, self.directory)
            return copy.read_bytes()

    def read(self, url: str, attempts: int | None = None, most: int = JSON_BYTES) -> bytes:
        def attempt() -> bytes:
            with transport_of(url).open(url) as opened:
                return read_all(opened, url, most)

        return self.persistently(attempt, url, attempts)

    def _fetch(self, path: Path, expected: TarShard | None) -> None:
        """Copy a tar, whose exclusive lock is held, so that making room leaves it."""
        for leftover in os.scandir(self.directory):  # of processes that were killed
            if is_scratch_of(path, leftover.name):
                os.unlink(leftover)
        url = self.url(path.name)
        with written_aside(path) as file:
            copied = _Copied()
            self.persistently(lambda: self._copy(url, file, copied, expected), url)
            size, digest = copied.size, copied.digest.hexdigest()
            if expected is not None and (size, digest) != (expected.size, expected.sha256):
                raise self._changed(url, f"{size} bytes with SHA-256 {digest[:8]}..., not", expected)
        self.cache.shrink()

    def _changed(self, url: str, found: str, expected: TarShard) -> InputError:
        return InputError(f"{masked(url)} has changed since it was indexed: {found} {expected.size} with "
                          f"{expected.sha256[:8]}...; {self.advice}")

    def _copy(self, url: str, file: BinaryIO, copied: _Copied, expected: TarShard | None) -> None:
        """Write the rest of a tar into the file, or all of it where the rest cannot be had."""
        try:
            with transport_of(self.source).open(url, copied.size, copied.tag) as opened:
                if opened.start != copied.size:
                    copied.size, copied.digest = 0, hashlib.sha256()
                file.seek(copied.size)
                file.truncate()
                copied.tag = opened.tag
                for data in iter(lambda: opened.stream.read(_CHUNK), b""):
                    self._append(data, file, copied)
                    if expected is not None and copied.size > expected.size:  # perhaps without end
                        raise self._changed(url, "more than", expected)
                check_end(copied.size, opened.size)
                if expected is not None and not opened.delimited and copied.size < expected.size:
                    check_end(copied.size, expected.size)
        except OtherPart:
            copied.tag = None  # so that the next attempt asks for all of it
            raise

    def _append(self, data: bytes, file: BinaryIO, copied: _Copied) -> None:
        try:
            file.write(data)
            file.flush()
        except OSError as error:
            raise InputError(f"{self.directory} cannot be written ({error.strerror}); make room, bound "
                             "data.cache_gb, or let data.cache name another directory") from None
        copied.digest.update(data)
        copied.size += len(data)


@dataclass
class _Copied:
    """What one or several attempts have written of a tar: bytes, their SHA-256, and the tag of the content they are of.
    """

    size: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    tag: str | None = None


def _bring_up_to_date(tars: RemoteTars, extensions: tuple[str, ...], max_bad_fraction: float) -> None:
    """Afterwards the cache has an index that is the remote one's, or fits the remote tars."""
    kept, published = tars.directory / INDEX_FILE, tars.published(INDEX_FILE)
    earlier = kept.read_bytes() if kept.is_file() else None
    if published is not None and published != earlier:
        _adopt(tars, published)
    elif earlier is None:
        _build(tars, extensions, max_bad_fraction)
    elif published is None:
        _check_current(tars, _kept_index(tars).shards)


def _kept_index(tars: RemoteTars) -> Contents:
    try:
        return load_index(tars.directory)
    except InputError as error:
        raise InputError(f"the index in {tars.directory} is damaged ({error}); remove that directory") from None


def _job() -> str:
    """What the ranks of a job have in common, and no other process has; nothing for a process by itself."""
    return ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"))


def _checked_by_this_job(tars: RemoteTars) -> bool:
    """Whether another rank of this host has just compared the copies with the remote side, or could not reach it."""
    path = tars.directory / _CHECKED
    if launched_rank_or_alone().is_alone or not path.is_file():
        return False
    return path.read_text() == _job() and time.time() - path.stat().st_mtime < _TRUSTED


def _adopt(tars: RemoteTars, description: bytes) -> None:
    """Copy the index of the remote directory, and remove copies of tars that it describes otherwise than before."""
    scratch = tars.directory / ".new-index"
    scratch.mkdir(exist_ok=True)
    (scratch / INDEX_FILE).write_bytes(description)
    (scratch / TABLE_FILE).write_bytes(tars.read(tars.url(TABLE_FILE), most=ARRAY_BYTES))
    try:
        shards = load_index(scratch).shards
    except InputError as error:
        raise InputError(f"the index of {tars.location} is damaged ({error}); index that directory again") from None
    before = []
    with suppress(InputError):
        before = load_index(tars.directory).shards
    if before:
        logger.warning("%s has been indexed anew since it was last read here; changed shards are fetched again",
                       tars.location)
    for path in tars.directory.glob("*.[tT][aA][rR]"):
        if path.name not in {shard.name for shard in shards if shard in before}:
            with locked(lock_of(path)):
                path.unlink(missing_ok=True)
    for name in (TABLE_FILE, INDEX_FILE):
        os.replace(scratch / name, tars.directory / name)
    scratch.rmdir()


def _build(tars: RemoteTars, extensions: tuple[str, ...], max_bad_fraction: float) -> None:
    """Fetch everything that is not there yet, and index it."""
    sizes = tars.sizes()
    for name, size in sizes.items():
        copy = tars.directory / name
        with locked(lock_of(copy)):
            if size is not None and copy.exists() and copy.stat().st_size != size:
                copy.unlink()
    try:
        contents = scan_shards(tars, list(sizes), extensions, max_bad_fraction)
    except InputError as error:
        raise InputError(f"{error} (copies are in {tars.directory})") from None
    write_index(tars.directory, contents)


def _check_current(tars: RemoteTars, shards: list[TarShard]) -> None:
    """InputError when the remote tars are not those that were indexed, as far as names and sizes tell."""
    try:
        sizes = tars.sizes(_FEW)
    except Unreachable as error:
        logger.warning("%s; going on with the index in %s", error, tars.directory)
        return
    indexed = {shard.name: shard.size for shard in shards}
    for name in sorted(sizes.keys() | indexed.keys()):
        size = sizes.get(name)
        if name not in sizes or name not in indexed or size not in (None, indexed[name]):
            change = ("is no longer there" if name not in sizes else "is new" if name not in indexed
                      else f"has {size} bytes, not {indexed[name]}")
            raise InputError(f"{tars.name(name)} {change}: the shards have changed since they were indexed; "
                             f"{tars.advice}")
