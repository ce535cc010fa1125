"""Say how a training run is doing: step, time left, speed, newest checkpoint, faults so far.

  gigatok-ds status runs/ss
  gigatok-ds status runs/ss --json        the same for programs

Read from the run directory alone (metrics.jsonl, history.jsonl, heartbeat.json, checkpoints), from any host that sees
it. Exit code 0 when it is running, finished or was stopped in order, 1 when it failed or nothing is heard of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

HELP = "how a run is doing: step, time left, speed, faults"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.training.run_status import status
    from gigatok_ds.untrusted import printable

    found = status(args.run_directory)
    print(json.dumps(found, indent=2) if args.json else "\n".join(map(printable, _lines(found))))
    return int(found["state"] in ("failed", "silent"))


def _lines(found: dict):
    yield f"{found['recipe']} in {found['run']}: {found['state']}"
    yield f"step {found['step']:,} of {found['steps']:,} ({found['step'] / found['steps']:.1%})"
    if found["seconds_since_heard"] is not None:
        yield f"last heard of {_duration(found['seconds_since_heard'])} ago"
    if found["seconds_per_step"] is not None:
        speeds = "".join(f", {value:.4g} {unit} a second" for unit, value in found["per_second"].items())
        yield f"{found['seconds_per_step']:.4g} s a step{speeds}; {_duration(found['seconds_left'])} left at that speed"
    if found["steps_left_out"]:
        yield f"left out {found['steps_left_out']:,} steps ({found['share_left_out']:.1%}), which changed nothing"
    yield f"newest checkpoint: {found['newest_checkpoint'] or 'none'}"
    yield f"started {found['starts']} times, {len(found['faults'])} stops and faults, {len(found['warnings'])} warnings"
    for line in found["faults"]:
        when = datetime.datetime.fromtimestamp(line["time"]).isoformat(" ", "seconds")
        yield f"- {when} {line['event']}: {line.get('reason', '')}"
    for warning in found["warnings"]:
        yield f"- warning: {warning}"


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(min(seconds, 1e12))))
