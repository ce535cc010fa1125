"""What state a run is in, read from its directory while it trains or afterwards."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gigatok_ds.checkpoint.run_directory import RECIPE_FILE, complete_checkpoints
from gigatok_ds.config.load import load_recipe
from gigatok_ds.errors import InputError
from gigatok_ds.monitoring.history import LATEST, read_history
from gigatok_ds.monitoring.metrics import LARGEST_STEP, METRICS_FILE, read_metrics
from gigatok_ds.resilience.watchdog import HEARTBEAT
from gigatok_ds.untrusted import is_number, read_json

FAULTS = ("failed", "stopped", "skipped", "rewound", "damaged")  # events of a history
ALIVE_SECONDS = 120.0  # since the last heartbeat, or the last of anything else that a run writes


def status(run_dir: Path, now: float | None = None) -> dict:
    """State, progress, speed, time left, newest checkpoint, and the faults so far.

    state is finished, running, stopped (asked to, and saved), failed, or silent: nothing was heard of it for two
    minutes (validation and saving are silent, too). Times are in seconds. Raises InputError when it is not a run.
    """
    now = time.time() if now is None else now
    if not (run_dir / RECIPE_FILE).is_file():
        raise InputError(f"{run_dir} is not a training run: it has no {RECIPE_FILE}")
    recipe, history = load_recipe(str(run_dir / RECIPE_FILE)), read_history(run_dir)
    metrics = read_metrics(run_dir) if (run_dir / METRICS_FILE).is_file() else []
    heartbeat = _heartbeat(run_dir / HEARTBEAT)
    checkpoints = complete_checkpoints(run_dir)
    step = max([line["step"] for line in metrics] + [heartbeat.get("step", 0)], default=0)
    heard = max([line["time"] for line in [*metrics, *history]] + [heartbeat.get("time", 0.0)], default=0.0)
    speed: dict[str, Any] = next(
        (line for line in reversed(metrics) if is_number(line.get("throughput/step_seconds"), 0, LATEST)), {})
    skipped = next((line["skipped_steps"] for line in reversed(metrics) if "skipped_steps" in line), 0)
    total, seconds = recipe.training.steps, speed.get("throughput/step_seconds")
    return {
        "run": str(run_dir), "recipe": recipe.name,
        "state": _state(history, now - heard), "step": step, "steps": total,
        "seconds_since_heard": round(now - heard, 1) if heard else None,
        "seconds_per_step": seconds,
        "per_second": {name.removeprefix("throughput/").removesuffix("_per_second"): value
                       for name, value in speed.items() if name.endswith("_per_second") and is_number(value)},
        "seconds_left": None if seconds is None else round((total - step) * seconds, 1),
        "steps_left_out": int(skipped), "share_left_out": round(skipped / step, 4) if step else 0.0,
        "newest_checkpoint": str(checkpoints[-1][1]) if checkpoints else None,
        "starts": sum(line["event"] == "started" for line in history),
        "faults": [line for line in history if line["event"] in FAULTS],
        "warnings": [line["warning"] for line in metrics if "warning" in line],
    }


def _heartbeat(path: Path) -> dict:
    """Step and time of the last sign of life; of none, nothing."""
    if not path.is_file():
        return {}
    found = read_json(path, advice="it is written again when the run goes on; remove it")
    for name, most in (("step", LARGEST_STEP), ("time", LATEST)):
        value = found.get(name, 0)
        if not is_number(value, 0, most) or (name == "step" and type(value) is not int):
            raise InputError(
                f"{path} is damaged ({name} is {repr(value)[:80]}); it is written again when the run goes on; remove it"
            )
    return found


def _state(history: list[dict], silence: float) -> str:
    ends: dict[str | None, str] = {"finished": "finished", "failed": "failed", "stopped": "stopped"}
    last = next((line["event"] for line in reversed(history) if line["event"] in ("started", *ends)), None)
    return ends.get(last) or ("running" if silence < ALIVE_SECONDS else "silent")
