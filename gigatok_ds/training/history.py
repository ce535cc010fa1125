"""history.jsonl: when a run was started, saved, stopped, and what it failed of; over all its restarts."""

from __future__ import annotations

import json
import time
from pathlib import Path

from gigatok_ds.errors import InputError

HISTORY_FILE = "history.jsonl"


def tell(run_dir: Path, event: str, **fields) -> None:
    """Append a line {"time" (Unix seconds), "event", the fields}; whole lines only, whoever else writes."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n"
    with open(run_dir / HISTORY_FILE, "ab", buffering=0) as file:
        file.write(line.encode())


def read_history(run_dir: Path) -> list[dict]:
    """The lines, oldest first; none of a run without the file. A last line cut short by a crash is left out."""
    path = run_dir / HISTORY_FILE
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); repair or remove it") from None
