"""How commands say things beside their results: what `logging` is told of, on standard error, a line each."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

_PACKAGE = logging.getLogger("gigatok_ds")


class _Lines(logging.Formatter):
    """Warnings and errors say that they are; notes are the bare text."""

    def __init__(self, prefix: str):
        super().__init__()
        self.prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self.prefix}{level}{record.getMessage()}"


class _AboveBars(logging.Handler):
    """To what is the standard error then, without breaking the bars that are drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is None:  # started without one
            return
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            line, bars = self.format(record), sys.modules.get("tqdm")  # a launcher's Python need not have it
            if bars:
                bars.tqdm.write(line, file=sys.stderr)
            else:
                sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


@contextlib.contextmanager
def messages_shown(prefix: str = "") -> Iterator[None]:
    """Within, the loggers of this package write notes and warnings to standard error, each after the prefix."""
    handler = _AboveBars()
    handler.setFormatter(_Lines(prefix))
    level, propagates = _PACKAGE.level, _PACKAGE.propagate
    _PACKAGE.addHandler(handler)
    _PACKAGE.setLevel(logging.INFO)
    _PACKAGE.propagate = False  # other libraries give the root logger handlers of their own
    try:
        yield
    finally:
        _PACKAGE.removeHandler(handler)
        _PACKAGE.setLevel(level)
        _PACKAGE.propagate = propagates
