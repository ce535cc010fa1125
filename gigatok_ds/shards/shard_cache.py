"""The directory of this host that keeps copies of remote tars, for all processes and all runs.

Each location has a directory of its own in it. A tar that is used is locked (shared) meanwhile, a tar that is fetched
or removed exclusively; the locks are files beside the tars, and the system releases those of a process that dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from gigatok_ds.config.location import masked
from gigatok_ds.errors import InputError
from gigatok_ds.shards.contents import TarShard
from gigatok_ds.shards.index import PATIENCE
from gigatok_ds.shards.tar_scan import safe_key
from gigatok_ds.user_cache import user_cache

_MARK = ".copies-of-remote-shards"  # in the directories that are ours: beside them the user may keep what he likes


def default_root() -> Path:
    """Where copies are kept unless the user says otherwise."""
    return user_cache() / "gigatok_ds" / "shards"


@dataclass(frozen=True)
class ShardCache:
    """Copies of tars under `root`; with a limit, in bytes, those not used for the longest time are removed.

    `patience` is for how many seconds what cannot be read is tried again.
    """

    root: Path = field(default_factory=default_root)
    limit: int | None = None
    patience: float = field(default_factory=lambda: PATIENCE)

    @classmethod
    def of(cls, cache: str | None, cache_gb: float | None, patience: float) -> ShardCache:
        """The cache that a recipe's data.cache, data.cache_gb (10^9 bytes) and data.patience (minutes) describe."""
        return cls(default_root() if cache is None else Path(cache), None if cache_gb is None else int(cache_gb * 1e9),
                   60 * patience)

    def directory(self, location: str) -> Path:
        """The directory of a location, made if need be: the end of the location, to be recognised, and its hash."""
        readable = safe_key(masked(location).partition("?")[0].rstrip("/").rpartition("/")[2])[-40:]
        path = self.root / f"{readable}-{hashlib.sha256(location.encode()).hexdigest()[:16]}"
        path.mkdir(parents=True, exist_ok=True)
        (path / _MARK).touch()
        return path

    def shrink(self) -> None:
        """Remove what was not used for the longest time until the rest fits, but nothing that is locked."""
        if self.limit is None:
            return
        with locked(self.root / "shrink.lock"):
            used = {}
            copies = (path for mark in self.root.glob(f"*/{_MARK}") for path in mark.parent.glob("*.[tT][aA][rR]"))
            for path in copies:
                with contextlib.suppress(FileNotFoundError):  # another process may drop copies of an older index
                    used[path] = path.stat()
            excess = sum(status.st_size for status in used.values()) - self.limit
            for path in sorted(used, key=lambda path: used[path].st_mtime_ns):
                if excess > 0 and _removed(path):
                    excess -= used[path].st_size

    def check_room(self, location: str, shards: list[TarShard]) -> str | None:
        """A warning when not all shards fit. Raises InputError when the largest does not."""
        largest, total = max(shard.size for shard in shards), sum(shard.size for shard in shards)
        if self.limit is None or total <= self.limit:
            return None
        if largest > self.limit:
            raise InputError(f"data.cache_gb is {self.limit / 1e9:g}, but a single shard of {location} has "
                             f"{largest / 1e9:g} GB; it must be more than that")
        return (f"the {total / 1e9:.3g} GB of {location} do not fit into data.cache_gb {self.limit / 1e9:g}: training "
                "fetches shards again and again, unless data.shuffle_shards is small, or it reads in order")


@contextlib.contextmanager
def locked(path: Path, kind: int = fcntl.LOCK_EX) -> Iterator[TextIO]:
    """Hold the lock at `path`; fcntl.flock turns that of the file that is handed out into another kind."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise InputError(
            f"{path} cannot be opened ({error.strerror}); let data.cache name a directory that you may write to"
        ) from None
    with file:
        try:
            fcntl.flock(file, kind)
        except BlockingIOError:
            raise
        except OSError as error:
            raise InputError(f"{path} cannot be locked ({error.strerror}); let data.cache name a directory of another "
                             "file system, best of a local disk") from None
        yield file


def lock_of(tar: Path) -> Path:
    return tar.with_name(f"{tar.name}.lock")


def _removed(tar: Path) -> bool:
    """Remove a tar, unless somebody uses it."""
    try:
        with locked(lock_of(tar), fcntl.LOCK_EX | fcntl.LOCK_NB):
            tar.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    return True
