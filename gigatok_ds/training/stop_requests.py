"""SIGTERM, SIGUSR1 and SIGHUP: the machine is wanted back. Training stops after its step, saves, and can be queued again."""

from __future__ import annotations

import os
import signal
import threading

REQUEUE = 75  # the exit code of a run that was asked to stop and has saved: BSD's "temporary failure", try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequests:
    """As a context, notes the signals instead of dying of them: `received` is the last one, or 0.

    Any rank's counts for all: ranks tell each other as they decide about a step (`StepGuard`). Processes that a rank forks, data
    workers above all, ignore the first signal, which schedulers send to all of a job; a second one ends them.
    """

    def __init__(self):
        self.pid, self.received = os.getpid(), 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS
                            if signal.getsignal(number) is not signal.SIG_IGN}  # nohup's choice
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.received and os.getpid() != self.pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
