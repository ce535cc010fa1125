"""A run that stops moving ends by itself, with the stacks of every rank on the disk, instead of burning its allocation.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from gigatok_ds.files import naming_failures, write_atomically
from gigatok_ds.parallel.flight_recorder import last_collectives

STACKS = "stacks"
HEARTBEAT = "heartbeat.json"
HEARTBEAT_SECONDS = 10.0
# Ranks stall together, but not at the same moment: how long one waits for the others to write their stacks, too.
GATHER_SECONDS = 3.0
# A thread of Python's cannot run while stuck C code holds the interpreter: then C code ends the process so much later.
BACKSTOP_SECONDS = 30.0


class Watchdog:
    """Every rank has one. `beat` says that it lives; after `seconds` without one its stacks and latest collectives are
    written to RUN/stacks/rank-R.txt, and `end(text, exit code)` is called, on a thread of its own. None: never.

    The first rank also leaves heartbeat.json, with step and time, at most every ten seconds.
    """

    def __init__(self, seconds: float | None, run_dir: Path, rank: int, end: Callable[[str, int], None]):
        self.seconds, self.run_dir, self.rank, self.end = seconds, run_dir, rank, end
        self.file = run_dir / STACKS / f"rank-{rank:05d}.txt"
        self.step, self._beat, self._written = 0, time.monotonic(), 0.0
        self._over = threading.Event()
        self._backstop: TextIO | None = None

    def __enter__(self) -> Watchdog:
        if self.seconds is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._backstop = open(self.file, "a", encoding="utf-8")  # closed in __exit__
            threading.Thread(target=self._watch, args=(self.seconds, self._backstop), daemon=True,
                             name="watchdog").start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        if self._backstop:
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(OSError):  # of stacks that could not be written
                self._backstop.close()
            if not self.file.stat().st_size:
                self.file.unlink()
                with contextlib.suppress(OSError):  # those of other ranks are there
                    self.file.parent.rmdir()

    def beat(self, step: int) -> None:
        """This rank is at `step`, and alive."""
        self.step, self._beat = step, time.monotonic()
        if self._backstop and self.seconds is not None:
            faulthandler.dump_traceback_later(self.seconds + BACKSTOP_SECONDS, exit=True, file=self._backstop)
        if self.rank == 0 and self._beat - self._written > HEARTBEAT_SECONDS:
            self._written = self._beat
            beat = {"step": step, "time": round(time.time(), 3), "host": socket.gethostname(), "pid": os.getpid()}
            with naming_failures(self.run_dir / HEARTBEAT):
                write_atomically(self.run_dir / HEARTBEAT, (json.dumps(beat) + "\n").encode())

    def _write_stacks(self, file: TextIO) -> None:
        file.write(f"rank {self.rank}: at step {self.step} for more than {self.seconds:g} s\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        # Last, since it asks PyTorch, which may be what is stuck.
        file.write("".join(f"collective: {line}\n" for line in last_collectives()))
        file.flush()

    def _watch(self, seconds: float, file: TextIO) -> None:
        while not self._over.wait(min(1.0, seconds / 4)):
            if time.monotonic() - self._beat < seconds:
                continue
            with contextlib.suppress(OSError):  # a full disk, perhaps what is stuck
                self._write_stacks(file)
            if not self._over.wait(GATHER_SECONDS):
                self.end(f"rank {self.rank} (host {socket.gethostname()}, pid {os.getpid()}) has been at step "
                         f"{self.step} for more than {seconds:g} s (monitor.stall_seconds); what every rank was "
                         f"doing is in {self.file.parent}", 1)
            return
