"""One rank's failure ends all: promptly, with a non-zero exit code, and saying once which rank it was and why.

Collectives only hang or complain about a closed connection when a rank is gone. So every rank keeps a connection to
rank 0 next to them, over which it says goodbye or what went wrong; one that closes without a word belonged to a rank
that was killed. A thread on every rank watches, and ends its process even when the main thread waits in a collective.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from gigatok_ds.config.location import masked
from gigatok_ds.errors import InputError, MachineError, exit_code
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.untrusted import printable

# A failure is held back this long, in case the death of another rank turns out to be its cause.
GRACE_SECONDS = 0.5
# How long a failing rank waits for rank 0 to have told of it.
REPORT_SECONDS = 20.0
# How long a rank waits at the start to hear from rank 0 where that is.
GREETING_SECONDS = 60.0
# A host that lost power closes no connection: it is asked for a sign of life (idle, interval, attempts).
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


# Ends the job from any thread: what to print, once, and the exit code.
End = Callable[[str, int], None]


@contextlib.contextmanager
def watch_ranks(topology: Topology, report: Callable[[str], None] = lambda text: None) -> Iterator[End]:
    """Within, no rank outlives another's failure; gives a function that ends all of them. Collective.

    An exception does not leave this context when there are several ranks: it is reported and the process ends, with
    exit code 2 for an InputError, or an OSError that does not pass by itself, and 1 for anything else. `report` gets
    what is reported, on the first rank.
    """
    if topology.world_size == 1:
        with _single(report) as end:
            yield end
        return
    server = socket.create_server(("", 0)) if topology.is_first else None
    port, token = topology.from_first((server.getsockname()[1], secrets.token_hex(16)) if server else None)
    watch = _Hub(server, token, topology.world_size, report) if server else _Spoke(topology.rank, port, token)
    try:
        yield watch.fail
    except BaseException as error:
        text, code = _described(error, topology.rank)
        watch.fail(text, code)
    else:
        watch.leave()


@contextlib.contextmanager
def _single(report: Callable[[str], None]) -> Iterator[End]:
    """The same for a rank without others, whose exceptions go their way."""

    def end(text: str, code: int) -> None:
        with contextlib.suppress(OSError):
            report(text)
        _print(text)
        _leave(code)

    try:
        yield end
    except BaseException as error:
        text, _ = _described(error, 0)
        if text:
            with contextlib.suppress(OSError):
                report(text)
        raise


def _described(error: BaseException, rank: int) -> tuple[str, int]:
    """What to print about an exception (nothing for an interruption), and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "", 130
    if isinstance(error, SystemExit):
        return "", error.code if isinstance(error.code, int) and error.code else 1
    if isinstance(error, (InputError, OSError)) and not os.environ.get("GIGATOK_TRACEBACK"):
        return f"gigatok-ds train: error: {printable(masked(' '.join(str(error).split())))}", exit_code(error)
    if isinstance(error, MachineError):
        return f"gigatok-ds train: {masked(error)}", 1
    return f"rank {rank} ({_here()}) failed:\n{traceback.format_exc().rstrip()}", 1


def _here() -> str:
    return f"host {socket.gethostname()}, pid {os.getpid()}"


def _died(rank: int, place: str) -> str:
    return f"rank {rank} ({place}) died without a message: it was killed from outside, often for lack of memory"


class _Hub:
    """Rank 0's end of all connections."""

    def __init__(self, server: socket.socket, token: str, world_size: int, report: Callable[[str], None]):
        self._reported = report
        self._server, self._token, self._waiting = server, token, set(range(1, world_size))
        self._peers: dict[socket.socket, _Peer] = {}
        self._lock, self._all_left = threading.RLock(), threading.Event()
        self._failure: tuple[float, str, int] | None = None
        threading.Thread(target=self._watch, daemon=True, name="watch-ranks").start()

    def leave(self) -> None:
        """Wait until the others have left, too: until then one of them may still fail."""
        self._all_left.wait()
        for peer in list(self._peers):
            peer.close()

    def fail(self, text: str, code: int) -> None:
        time.sleep(GRACE_SECONDS if code == 1 else 0)
        self._end(text, code)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector, self._server:
            selector.register(self._server, selectors.EVENT_READ)
            while self._waiting:
                for key, _ in selector.select(timeout=0.1):
                    if key.fileobj is self._server:
                        connection, _ = self._server.accept()
                        _keep_alive(connection)
                        self._peers[connection] = _Peer()
                        selector.register(connection, selectors.EVENT_READ)
                        continue
                    assert isinstance(key.fileobj, socket.socket)
                    if not self._hear(key.fileobj):
                        selector.unregister(key.fileobj)
                if self._failure and time.monotonic() > self._failure[0]:
                    self._end(*self._failure[1:])
        self._all_left.set()

    def _hear(self, connection: socket.socket) -> bool:
        """Take in what a peer says; False when it has said its last."""
        peer = self._peers[connection]
        data = b""
        with contextlib.suppress(OSError):
            data = connection.recv(1 << 16)
        if not data:
            if peer.rank is not None and peer.rank in self._waiting:
                self._end(_died(peer.rank, peer.place), 1)
            return False
        *lines, peer.buffer = (peer.buffer + data).split(b"\n")
        for message in map(json.loads, lines):
            if peer.rank is None:
                if message.get("token") != self._token:
                    return False
                peer.rank, peer.place = message["rank"], message["place"]
                _send(connection, place=_here())
            elif "failed" in message:
                self._failure = self._failure or (time.monotonic() + GRACE_SECONDS, *message["failed"])
            else:
                self._waiting.discard(peer.rank)
        return True

    def _end(self, text: str, code: int) -> None:
        with self._lock:  # kept: whoever comes second must not print
            _print(text)
            if text:
                with contextlib.suppress(OSError):
                    self._reported(text)
            for connection in self._peers:
                with contextlib.suppress(OSError):
                    _send(connection, end=code)
            _leave(code)


class _Peer:
    """What the hub knows of a connection."""

    def __init__(self):
        self.rank: int | None = None
        self.place, self.buffer = "", b""


class _Spoke:
    """Any other rank's connection to rank 0."""

    def __init__(self, rank: int, port: int, token: str):
        self._rank, self._left, self._greeted = rank, False, threading.Event()
        self._connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=60)
        self._connection.settimeout(None)
        _keep_alive(self._connection)
        _send(self._connection, token=token, rank=rank, place=_here())
        threading.Thread(target=self._watch, daemon=True, name="watch-ranks").start()
        self._greeted.wait(GREETING_SECONDS)

    def leave(self) -> None:
        self._left = True
        with contextlib.suppress(OSError):
            _send(self._connection, left=True)

    def fail(self, text: str, code: int) -> None:
        with contextlib.suppress(OSError):
            _send(self._connection, failed=[text, code])
            time.sleep(REPORT_SECONDS)  # the watching thread ends this process when rank 0 has told of it
        _print(text)
        _leave(code)

    def _watch(self) -> None:
        place = "its host is unknown"
        with contextlib.suppress(OSError), self._connection.makefile("rb") as lines:
            for message in map(json.loads, lines):
                if "end" in message:
                    _leave(message["end"])
                place = message["place"]
                self._greeted.set()
        if not self._left:
            if self._rank == 1:  # one of the others is enough
                _print(_died(0, place))
            _leave(1)


def _leave(code: int) -> None:
    """End this process from whatever thread, and its data workers with it: one that is stopped would never notice."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _send(connection: socket.socket, **message) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _print(text: str) -> None:
    if text:
        sys.stderr.write(f"\n{text}\n")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
