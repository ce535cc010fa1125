"""How an index comes by its tars: from a directory of this host, or from wherever else (`shards.remote`)."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gigatok_ds.shards.contents import INDEX_FILE, TABLE_FILE, TarShard

REBUILD = f"delete {INDEX_FILE} and {TABLE_FILE} to index the directory again"


def most_open() -> int:
    """How many tars one index holds open at once in one process: an eighth of the files that it may open, 128 at most.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 128 if allowed == resource.RLIM_INFINITY else min(128, allowed // 8)


class ShardFiles(Protocol):
    """The tars of one location. Can be pickled, and used on both sides of a fork.

    `location` is what the user gave, `advice` what helps against a tar that is not as it was indexed. `transient` says
    that tars may be removed while they are used, to be fetched again when they are needed.
    """

    @property
    def location(self) -> str: ...

    @property
    def advice(self) -> str: ...

    @property
    def transient(self) -> bool: ...

    def name(self, tar: str) -> str:
        """Path or URL of a tar, for messages."""

    def held(self, tar: str, expected: TarShard | None = None) -> AbstractContextManager[Path]:
        """A tar as a file of this host that stays there meanwhile. InputError when it cannot be had.

        `expected` is how it was indexed, None while it is being indexed.
        """


@dataclass(frozen=True)
class LocalFiles:
    """The tars of a directory; whether they are as expected is left to who opens them."""

    directory: Path
    index: Path | None = None  # the directory that holds the index, None: the same
    transient = False

    @property
    def advice(self) -> str:
        there = "" if self.index in (None, self.directory) else f" (in {self.index})"
        return f"copy it again, or {REBUILD}{there}"

    @property
    def location(self) -> str:
        return str(self.directory)

    def name(self, tar: str) -> str:
        return str(self.directory / tar)

    @contextmanager
    def held(self, tar: str, expected: TarShard | None = None) -> Iterator[Path]:
        yield self.directory / tar
