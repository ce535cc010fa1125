"""Processes that share the work on shards, and end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.synchronize import Event

from gigatok_ds.data.pillow_warnings import say_pillows_once
from gigatok_ds.errors import InputError


def worker_count(given: int | None) -> int:
    """How many processes to use: as many as there are cores, unless given. 0: the caller does the work itself."""
    if given is not None and given < 0:
        raise InputError(f"--workers is {given}; it must be 0 or more")
    return len(os.sched_getaffinity(0)) if given is None else given


def in_processes(function: Callable, tasks: Iterable[tuple], workers: int) -> Iterator:
    """function(*task) of each task, in their order; with `workers` processes, or in this one (0).

    Tasks are drawn when there is something to do for them. An exception of the function ends it, and InputError says
    that a process was killed.
    """
    if workers == 0:
        yield from (function(*task) for task in tasks)
        return
    # Not forked, since this process may have threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(context.Event(),))
    waiting: deque = deque()
    try:
        for task in tasks:
            with _deaf_to_interruptions():  # submitting starts processes
                waiting.append(pool.submit(function, *task))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise InputError("a worker process was killed (out of memory?); run the same command again, perhaps with fewer "
                         "--workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _deaf_to_interruptions() -> Iterator[None]:
    """Processes that are started within do not hear of Ctrl-C, which a terminal tells all: who has started them ends
    them.
    """
    resource_tracker.ensure_running()  # which would hear of it again when it has started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare(said: Event) -> None:
    say_pillows_once(said)
    _end_with_parent()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next task for ever."""

    parent = multiprocessing.parent_process()
    assert parent is not None, "not a worker"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
