"""history.jsonl: when a run was started, saved, stopped, and what it failed of; over all its restarts."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import BinaryIO

from gigatok_ds.errors import InputError
from gigatok_ds.untrusted import is_number

HISTORY_FILE = "history.jsonl"
_LONGEST = 2**20  # bytes of a line
LATEST = 2.0**35  # Unix seconds, in the year 3058: no clock is so wrong


def record_event(run_dir: Path, event: str, **fields) -> None:
    """Append a line {"time" (Unix seconds), "event", the fields}; whole lines only, whoever else writes.

    What a crash has cut short goes. Raises OSError, and leaves the file as it was, where there is no room.
    """
    path = run_dir / HISTORY_FILE
    line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}).encode() + b"\n"
    with open(path, "a+b", buffering=0) as file:
        half = _half_line(file)
        if half:
            file.truncate(file.seek(-half, os.SEEK_END))
        if (written := file.write(line)) < len(line):
            file.truncate(file.seek(-written, os.SEEK_END))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _half_line(file: BinaryIO) -> int:
    """How many bytes follow the last whole line."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _LONGEST, 0))
    return len(file.read().rpartition(b"\n")[2])


def read_history(run_dir: Path) -> list[dict]:
    """The lines, oldest first; none of a run without the file. A last line cut short by a crash is left out."""
    path = run_dir / HISTORY_FILE
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = []
    for number, text in enumerate(lines, start=1):
        line = _line(text)
        if line is None:
            raise InputError(f"line {number} of {path} is damaged; repair or remove it")
        found.append(line)
    return found


def saved_step(line: dict) -> int | None:
    """The step whose checkpoint a line tells of, if it does."""
    step = line.get("step")
    return step if line["event"] == "saved" and type(step) is int else None


def _line(text: str) -> dict | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    full = isinstance(line, dict) and isinstance(line.get("event"), str) and is_number(line.get("time"), 0, LATEST)
    return line if full else None
