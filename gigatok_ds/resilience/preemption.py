"""SIGTERM, SIGUSR1 and SIGHUP: the machine is wanted back. Training stops after its step, saves, and can be queued
again.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gigatok_ds.signals import handled

REQUEUE = 75  # the exit code of a run that was asked to stop and has saved: BSD's "temporary failure", try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@contextmanager
def leaving_at_once(report: Callable[[str], None]) -> Iterator[None]:
    """Within, the signals raise SystemExit(REQUEUE), since there is nothing to save: before training, and after it.

    `report` gets the signal's name. StopRequests, inside of this context, has its own way.
    """

    def leave(number: int, _frame) -> None:
        name = signal.Signals(number).name
        report(name)
        if errors is not None:
            os.write(errors, f"stopped by {name}: the same command goes on (exit code {REQUEUE})\n".encode())
        raise SystemExit(REQUEUE)

    # A copy, since DeepSpeed lends the descriptor to a compiler's file meanwhile; none if it was closed from the start.
    errors = os.dup(sys.__stderr__.fileno()) if sys.__stderr__ else None
    try:
        with handled(leave, *SIGNALS):
            yield
    finally:
        if errors is not None:
            os.close(errors)


class StopRequests:
    """As a context, notes the signals instead of dying of them: `received` is the last one, or 0.

    Any rank's counts for all: ranks tell each other as they decide about a step (`StepGuard`). Processes that a rank
    forks, data workers above all, ignore the first signal, which schedulers send to all of a job; a second one ends
    them.
    """

    def __init__(self):
        self.pid, self.received = os.getpid(), 0
        self._handled = handled(self._note, *SIGNALS)

    def __enter__(self) -> StopRequests:
        self._handled.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._handled.__exit__(*error)

    def _note(self, number: int, _frame) -> None:
        if self.received and os.getpid() != self.pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
