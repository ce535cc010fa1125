"""What Pillow has to say of odd metadata: once, not for every image that has them."""

from __future__ import annotations

import logging
import multiprocessing.synchronize
import threading
import warnings
from typing import TextIO

logger = logging.getLogger(__name__)


def say_pillows_once(said: threading.Event | multiprocessing.synchronize.Event) -> None:
    """From now on, a warning that comes from Pillow is logged if nobody has `said` so yet, and left out
    otherwise.

    Warnings of other packages are shown as before. `warnings.catch_warnings` ends it.
    """
    show = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
              line: str | None = None) -> None:
        if "PIL" not in filename.replace("\\", "/").split("/"):
            show(message, category, filename, lineno, file, line)
        elif not said.is_set():
            said.set()
            logger.warning("Pillow says of an image: %s; what it says of others is not mentioned",
                           " ".join(str(message).split()))

    warnings.showwarning = shown
