"""Processes that share the work on shards, and end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor

from gigatok_ds.errors import InputError


def worker_count(given: int | None) -> int:
    """How many processes to use: as many as there are cores, unless given. 0: the caller does the work itself."""
    if given is not None and given < 0:
        raise InputError(f"--workers is {given}; it must be 0 or more")
    return len(os.sched_getaffinity(0)) if given is None else given


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Not forked, since this process may have threads."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next task for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
