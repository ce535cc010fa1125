"""Processes of benchmarks: run with a limit, in a scratch directory, and ended with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from gigatok_ds.errors import InputError
from gigatok_ds.training.environment import anonymise

CHECKOUT = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 3.0  # for a process that is asked to end
STOPPED = 128  # plus the signal's number: exit code


def run_script(name: str, main: Callable[[], int]) -> None:
    """Ends this process with the exit code of `main`: 2 and one line for what the user can mend.

    A signal ends what `watch` has started before it ends this process.
    """
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _stop)
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(STOPPED + signal.SIGINT)


def _stop(number: int, _frame) -> None:
    raise SystemExit(STOPPED + number)


def watch(command: list[str], log: Path, limit: float, *, environment: Mapping[str, str] = {},
          every: float = 30.0, tell: Callable[[float], None] = lambda seconds: None) -> int | None:
    """The exit code of a process whose output goes into `log`; None when it was stopped after `limit` seconds.

    `environment` is added to this process's own. `tell` hears every so many seconds for how long it has run.
    """
    scratch_directory = tempfile.TemporaryDirectory(prefix="gigatok-benchmark-", ignore_cleanup_errors=True)
    with scratch_directory as scratch, open(log, "wb") as output:
        own = os.environ | {"TMPDIR": scratch, "PYTHONUNBUFFERED": "1"} | environment
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=own,
                                   start_new_session=True)
        start = time.monotonic()
        try:
            while (left := start + limit - time.monotonic()) > 0:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(min(left, every))
                tell(time.monotonic() - start)
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """With all that it started. It is asked first: ninja keeps compilers in process groups of their own, which it ends
    then.
    """
    for ending, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, ending)
            process.wait(patience)


def last_line(log: Path) -> str:
    """What a process said last, without the places of this machine, which belong in no report."""
    lines = log.read_text(errors="replace").split("\n")
    return placeless(next((line.strip() for line in reversed(lines) if line.strip()), ""))


def placeless(text: str) -> str:
    """At most the last 300 characters of a line, paths of this machine replaced."""
    return anonymise(text.replace(str(CHECKOUT), ".").replace(sys.prefix, "PYTHON"))[-300:]
