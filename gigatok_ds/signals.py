"""Signals that end a process: what was begun is undone, and none of them is lost."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_AGAIN_SECONDS = 0.01


class _Ending:
    """A handler: it raises an exception, at once or, while it waits, afterwards. `interrupted`: SIGINT has come."""

    def __init__(self):
        self.waiting, self.arrived, self.interrupted = 0, [], False

    def __call__(self, number: int, _frame=None) -> None:
        self.interrupted |= number == signal.SIGINT
        if self.waiting:
            self.arrived.append(number)
        else:
            self.arrived.clear()
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


_ending = _Ending()


@contextmanager
def signals_wait() -> Iterator[None]:
    """Within, in the main thread, nothing is raised; for what arrived it is afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _ending.waiting += 1
    try:
        yield
    finally:
        _ending.waiting -= 1
        if _ending.arrived and not _ending.waiting:
            _ending(_ending.arrived[0])


@contextmanager
def undone_by_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise SystemExit, unless they have a handler already: scratch files are removed."""
    with _handled(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield


@contextmanager
def interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C raises KeyboardInterrupt; gives what says whether it did.

    Libraries turn it into errors of their own where it arrives in one of their callbacks. Where it arrives in a
    destructor Python ignores it: then it is raised again soon.
    """
    hook, _ending.interrupted = sys.unraisablehook, False

    def again(unraisable) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main).start()
        else:
            hook(unraisable)

    sys.unraisablehook = again
    try:
        with _handled(signal.SIGINT):
            yield lambda: _ending.interrupted
    finally:
        sys.unraisablehook = hook


@contextmanager
def _handled(*numbers: int) -> Iterator[None]:
    """Within, signals that have no handler of their own have ours, in the main thread."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: handler for number in numbers
                  if (handler := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler)}
    try:
        for number in before:
            signal.signal(number, _ending)
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _ending:
                signal.signal(number, handler)
