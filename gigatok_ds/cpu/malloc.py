"""Memory that stays with a process."""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Make the C library keep what is freed for the next allocation, where it is glibc; elsewhere do nothing.

    By itself it hands large blocks back to the operating system after each operation and has them made anew, page by
    page: feature maps in training on a CPU, decoded images in data workers.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never
