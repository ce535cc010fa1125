"""Signals that end a process: what was begun is undone, and none of them is lost."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager

_AGAIN_SECONDS = 0.01

DEFAULT = (signal.SIG_DFL, signal.default_int_handler)


@contextmanager
def handled(handler: Callable, *numbers: int, instead_of: Container | None = None) -> Iterator[None]:
    """Within, in the main thread, signals have this handler; afterwards, whatever happens, the one that they had.

    instead_of: only those that have one of these now. Without it all but the ignored ones, which is nohup's choice.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in numbers}
        before = {number: old for number, old in found.items()
                  if (old is not signal.SIG_IGN if instead_of is None else old in instead_of)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, old)


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
    with handled(_ending, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, instead_of=DEFAULT):
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
        with handled(_ending, signal.SIGINT, instead_of=DEFAULT):
            yield lambda: _ending.interrupted
    finally:
        sys.unraisablehook = hook
