"""One owner of a directory that is written in several steps: a second process is refused, a dead owner is succeeded.

The owner leaves `.owner.json`: its host and process, and a number that it raises every few seconds. Where the file
system has flock, that is held, too, and released by the kernel when the owner dies. Some file systems have it for one
host only, some not at all: what says that an owner of another host is dead is that its number stands still.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from gigatok_ds.errors import InputError

logger = logging.getLogger(__name__)

OWNER_FILE = ".owner.json"
BEAT_SECONDS = 5.0
SILENT_SECONDS = 90.0  # without a beat, as seen from here: clocks of hosts may differ
ORPHAN_SECONDS = 15.0  # data workers that a killed process started notice it
_BYTES = 1024  # always as long, so that no reader meets a half

_held: dict[Path, int] = {}  # descriptors, by the directory


class Ranks(Protocol):
    """What is needed of `parallel.topology.Topology`."""

    @property
    def is_first(self) -> bool: ...

    def from_first(self, value: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who writes a directory. `boot` is of the running kernel, `namespace` what process numbers count in, `started` the
    process's start in clock ticks: a number may be used again."""

    token: str
    host: str
    pid: int
    started: str
    boot: str
    namespace: str
    beat: int = 0

    @classmethod
    def this_process(cls) -> Owner:
        return cls(token=secrets.token_hex(8), host=socket.gethostname(), pid=os.getpid(),
                   started=_started(os.getpid()), boot=_boot(), namespace=_namespace())

    def __str__(self) -> str:
        return f"process {self.pid} of host {self.host}"

    def known_to_run(self) -> bool | None:
        """Whether it runs, where that can be seen: on this machine, by its number. None elsewhere."""
        if (self.boot, self.namespace) != (_boot(), _namespace()) or not self.boot:
            return None
        return bool(self.started) and _started(self.pid) == self.started


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Within, this process is the only one that does so for `directory`, which is made if it is not there.

    Raises InputError, naming the owner, when there is one that lives. Succeeds one that is dead; that may take
    SILENT_SECONDS when it was another host's. A process that lost a directory, since it was not heard of for so long,
    ends with code 2.
    """
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    lock = _Lock(directory)
    try:
        lock.take()
        with lock.beating():
            yield
    finally:
        lock.release()
        if made:
            with suppress(OSError):  # it is used
                directory.rmdir()


@contextmanager
def owned_by_first(directory: Path, ranks: Ranks) -> Iterator[None]:
    """The same for a job of several ranks, whose first one holds it for all. Collective; all raise what it raises."""
    with ExitStack() as stack:
        problem = None
        if ranks.is_first:
            try:
                stack.enter_context(owned(directory))
            except (InputError, OSError) as error:
                problem = str(error)
        if problem := ranks.from_first(problem):
            raise InputError(problem)
        yield


def is_ours(directory: Path) -> bool:
    """Whether this process owns a directory now."""
    return directory.absolute() in _held


def is_unused(directory: Path) -> bool:
    """Whether there is nothing at a path, or a directory with nothing in it but the mark of its owner."""
    return not directory.exists() or (directory.is_dir()
                                      and all(path.name == OWNER_FILE for path in directory.iterdir()))


class _Lock:
    def __init__(self, directory: Path):
        self.directory, self.file = directory.absolute(), directory.absolute() / OWNER_FILE
        self.owner, self.descriptor = Owner.this_process(), -1
        self._over = threading.Event()

    def take(self) -> None:
        if self.directory in _held:
            raise InputError(f"{self.directory} is written by this very process already")
        patience = time.monotonic() + ORPHAN_SECONDS
        while True:
            self._open()
            free, other = _flock(self.descriptor), self._read()
            runs = other.known_to_run() if other else False
            if free is False and runs is False and time.monotonic() < patience:
                time.sleep(0.2)  # another one that just started, or what a dead owner leaves behind
                continue
            if free is False or runs or (other and runs is None and self._beats(other)):
                raise InputError(
                    f"{self.directory} is being written by {other or 'another process'}; wait until that has "
                    "ended, end it, or choose another directory"
                )
            self._write()
            if not free:
                time.sleep(0.5)  # without flock: who writes last has it
            now = self._read()
            if now is not None and now.token == self.owner.token:
                _held[self.directory] = self.descriptor
                return

    def _open(self) -> None:
        """Open the file that has the name: an owner that ends removes it."""
        while True:
            self._close()
            self.descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            _flock(self.descriptor)
            if self._has_the_name():
                return

    def _has_the_name(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.file))
        except FileNotFoundError:
            return False

    def _read(self) -> Owner | None:
        """Who the file names, read anew: file systems of several hosts show what others wrote to those who open."""
        try:
            return Owner(**json.loads(self.file.read_bytes()[:_BYTES]))
        except (OSError, ValueError, TypeError, RecursionError):  # new, or not written by us
            return None

    def _write(self) -> None:
        os.pwrite(self.descriptor, json.dumps(asdict(self.owner)).encode().ljust(_BYTES), 0)
        os.fsync(self.descriptor)

    def _beats(self, other: Owner) -> bool:
        """Whether the number of another host's process is raised while one waits."""
        logger.info("%s was being written by %s, which cannot be asked from here: waiting up to %.0f s for a sign of "
                    "life", self.directory, other, SILENT_SECONDS)
        end = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, SILENT_SECONDS / 10))
            now = self._read()
            if now is None or now != other:
                return now is not None
        return False

    @contextmanager
    def beating(self) -> Iterator[None]:
        thread = threading.Thread(target=self._beat, daemon=True, name="owner")
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with suppress(OSError):  # a file system that is away for a while
                now = self._read()
                if now is not None and now.token != self.owner.token:
                    logger.error("%s now belongs to %s, since this process was not heard of for %.0f s", self.directory,
                                 now, SILENT_SECONDS)
                    os._exit(2)
                self.owner = replace(self.owner, beat=self.owner.beat + 1)
                self._write()

    def release(self) -> None:
        if self.descriptor >= 0 and _held.get(self.directory) == self.descriptor:
            del _held[self.directory]
            with suppress(OSError):
                if self._has_the_name():
                    self.file.unlink()
        self._close()

    def _close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _flock(descriptor: int) -> bool | None:
    """Whether the lock could be had; None where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _forget() -> None:
    """Close, in a forked child, what would stay locked after its parent's death."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str:
    """When a process was started, in clock ticks since the kernel was; nothing of one that has ended."""
    with suppress(OSError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in ("Z", "X") else fields[18]
    return ""
