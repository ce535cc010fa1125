"""Commands that are killed, interrupted, stopped for a while, or not read any more, at random moments; and are then run
again.
"""

import contextlib
import ctypes
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from rank_runs import ON_CPU, _context, _server_environment
from safetensors import safe_open

SECONDS = 120  # for a command


@dataclass
class Ended:
    """How a command ended: its exit code (negative: the signal that killed it), and what it printed to each stream."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def lines(self):
        """Of stderr, without progress bars."""
        return [line for line in self.err.replace("\r", "\n").splitlines() if line.strip() and "/s]" not in line
                and " written, " not in line]


@dataclass
class Command:
    """`gigatok-ds WORDS`, whose result lies at `out`. `again`: what may be said when it is run again and all is there.
    """

    words: list
    out: Path
    again: str | None = None
    environment: dict = field(default_factory=dict)

    def start(self, stdout, stderr):
        """In a session of its own, in a fork of a server that has done the imports."""
        surroundings = os.environ | ON_CPU | self.environment
        process = _context.Process(target=_child,
                                   args=(surroundings, str(stdout), str(stderr), list(map(str, self.words))))
        with _server_environment():
            process.start()
        return process

    def run(self, disturb=None, head=False):
        """Run it; `disturb` gets its process number. With `head` nobody reads what it prints after the first line."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            if head:
                os.mkfifo(out)
                reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
            began, process = time.monotonic(), self.start(out, err)
            try:
                _wait(lambda: process.exitcode is not None or _leads(process.pid))
                if head:
                    disturb = lambda pid: os.close(reader)  # noqa: E731
                if disturb and process.exitcode is None:
                    disturb(process.pid)
                process.join(SECONDS)
                assert process.exitcode is not None, (self.words, err.read_text())
                seconds = time.monotonic() - began
                _wait(lambda: not _alive(process.pid))  # what it has started ends with it
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.join()
            return Ended(process.exitcode, "" if head else out.read_text(), err.read_text() if err.exists() else "",
                         seconds)


def _child(surroundings, stdout, stderr, words):
    """`python -m gigatok_ds WORDS`; SIGINT does what it does in a fresh interpreter while the command runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(surroundings)
    for place, descriptor in ((stdout, 1), (stderr, 2)):
        with open(place, "ab", buffering=0) as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (as python has it: buffered where it is no terminal)
    import torch

    from gigatok_ds.__main__ import end
    from gigatok_ds.cli.main import main

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as it is in a fresh interpreter
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with the server
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main(words)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    end(code)


def _leads(pid):
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid) == pid
    return False


def _alive(session):
    """Whether any process of a session runs."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, _, _group, leader = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[:4]
            if int(leader) == session and state not in "ZX":
                return True
    return False


def _wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# What may happen to a command ---


def at(moment, action):
    def later(pid):
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            action(pid)

    return later


def paused(pid):
    os.killpg(pid, signal.SIGSTOP)
    time.sleep(0.3)
    os.killpg(pid, signal.SIGCONT)


DISTURBANCES = {
    "killed": lambda pid: os.kill(pid, signal.SIGKILL),
    "interrupted": lambda pid: os.killpg(pid, signal.SIGINT),
    "paused": paused,
    "unread": None,
}


def check_disturbed(command, reference, how, moment):
    """After a disturbance the same command again leaves what an undisturbed one does, `reference`."""
    ended = command.run(head=True) if how == "unread" else command.run(at(moment, DISTURBANCES[how]))
    what = (how, round(moment, 3), ended)
    assert "Traceback" not in ended.err and "Exception ignored" not in ended.err and "Broken pipe" not in ended.err, (
        what
    )
    if how == "interrupted":
        assert ended.code in (0, 130), what
        if ended.code:
            assert ended.lines[-1].startswith("interrupted; "), what
    elif how == "killed":
        assert ended.code in (0, -signal.SIGKILL), what
    elif how == "unread":
        assert ended.code in (0, 141) and not ended.lines, what
    else:
        assert ended.code == 0, what
    if how != "killed":
        left = [path.name for path in command.out.parent.glob(f".{command.out.name}.*")]
        assert not left, (what, left)
    again = command.run()
    full = (what, again)
    if again.code:
        assert again.code == 2 and len(again.lines) == 1 and command.again and command.again in again.lines[0], full
    found = content(command.out)
    assert found == reference, (full, [name for name in reference if found.get(name) != reference[name]]
                                if isinstance(found, dict) else "")


def content(place):
    """Every file below a path, or the file itself, without hidden ones. A safetensors file is what it says, in any
    order.
    """
    if place.suffix == ".safetensors":
        with safe_open(place, framework="pt") as file:
            return file.metadata(), {name: file.get_tensor(name).tolist() for name in sorted(file.keys())}
    if place.is_file():
        return place.read_bytes()
    return {str(path.relative_to(place)): content(path) for path in sorted(place.rglob("*"))
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(place).parts)}


def moments(seconds, count, seed):
    draw = random.Random(seed)
    return [draw.uniform(0, seconds) for _ in range(count)]
