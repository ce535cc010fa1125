"""Reading again what a file system of the network does not give just now."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from gigatok_ds.errors import InputError, MachineError

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds; each wait is twice as long as the one before
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

T = TypeVar("T")

logger = logging.getLogger(__name__)


def reread(action: Callable[[], T], name: str, patience: float, *, before: Callable[[], None]) -> T:
    """The result of `action`, which is repeated for `patience` seconds, each time after `before`, when it raises
    OSError.

    Raises InputError, naming the file, where it is missing or forbidden, and MachineError when patience is at its end.
    """
    until = time.monotonic() + patience
    for attempt in itertools.count(1):
        try:
            return action()
        except _FINAL as error:
            raise InputError(f"{name} cannot be read ({error.strerror}); is it still there?") from None
        except OSError as error:
            wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
            if time.monotonic() + wait > until:
                raise MachineError(
                    f"{name} cannot be read after {attempt} attempts ({error.strerror or error}); look at its "
                    "file system, and run the same command again"
                ) from None
            logger.warning("%s: attempt %d failed (%s); it is opened and read again in %.1f s", name, attempt,
                           error.strerror or error, wait)
        before()
        time.sleep(wait)
    raise AssertionError("itertools.count ended")
