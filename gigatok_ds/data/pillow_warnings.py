"""What Pillow has to say of odd metadata: once, not for every image that has them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)


class Flag(Protocol):
    """As threading's and multiprocessing's events are."""

    def is_set(self) -> bool: ...

    def set(self) -> None: ...


class Said:
    """A flag of this process."""

    def __init__(self, value: bool = False):
        self._value = value

    def is_set(self) -> bool:
        return self._value

    def set(self) -> None:
        self._value = True


def say_pillows_once(said: Flag) -> None:
    """From now on, a warning that comes from Pillow is logged if nobody has `said` so yet, and left out otherwise.

    Warnings of other packages are shown as before. `warnings.catch_warnings` ends it.
    """
    show = warnings.showwarning
    warnings.showwarning = _Once(show.show if isinstance(show, _Once) else show, said)


class _Once:
    def __init__(self, show: Callable[..., None], said: Flag):
        self.show, self.said = show, said

    def __call__(self, message, category, filename, *rest) -> None:
        if "PIL" not in filename.replace("\\", "/").split("/"):
            self.show(message, category, filename, *rest)
        elif not self.said.is_set():
            self.said.set()
            logger.warning("Pillow says of an image: %s; it is used all the same, and others like it are not mentioned",
                           " ".join(str(message).split()))
