"""The original's search for the guidance scale: a hill climb on gFID, resumable, each trial by all ranks."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from gigatok_ds.checkpoint.standalone import checkpoint_hash
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.results import read_figures
from gigatok_ds.files import sha256, write_atomically
from gigatok_ds.ownership import is_unused, owned
from gigatok_ds.studies.sampling_stages import GenerationSetup, Trial, generation_stages, remove_samples
from gigatok_ds.studies.stages import Launcher
from gigatok_ds.untrusted import read_json

SCALE_STEP = 0.25
SCHEDULES = ("constant", "step", "rectangular")
COLUMNS = ("annotation", "cfg_scale", "cfg_schedule", "FID", "Inception Score", "Precision", "Recall", "sFID")
_FIGURES = ("gfid", "inception_score", "precision", "recall", "sfid")


def next_scale(tried: Mapping[float, float], start: float, *, down_first: bool = False) -> float | None:
    """The scale to try after `tried` (scale: FID), or None when both neighbours of the best one have been.

    The neighbours are 0.25 away and at least 1; the upper one comes first unless `down_first`.
    """
    if not tried:
        return start
    best = min(tried, key=lambda scale: (tried[scale], scale))
    steps = (-SCALE_STEP, SCALE_STEP) if down_first else (SCALE_STEP, -SCALE_STEP)
    neighbours = [round(best + step, 2) for step in steps]
    return next((scale for scale in neighbours if scale >= 1 and scale not in tried), None)


def windows(schedule: str, window_start: float | None) -> list[dict[str, float]]:
    """The arguments that are searched over: one choice, or the grid of the rectangular schedule.

    Starts 0.10, 0.15 ... 0.80, ends 0.50, 0.55 ... 1.00, start before end.
    """
    if schedule == "constant":
        return [{}]
    if schedule == "step":
        return [{"window_start": 0.18 if window_start is None else window_start}]
    starts, ends = np.arange(10, 81, 5) / 100, np.arange(50, 101, 5) / 100
    return [{"window_start": float(start), "window_end": float(end)} for start in starts for end in ends if start < end]


def climb(schedule: str, start: float, window_start: float | None, measure: Callable[[Trial], float]) -> Trial:
    """The trial with the least FID of all that the search makes.

    Each window of a rectangular schedule starts at the best scale of the one before; the original's starts at the last
    scale that was tried.
    """
    found: dict[Trial, float] = {}
    for window in windows(schedule, window_start):
        tried: dict[float, float] = {}
        while (scale := next_scale(tried, start, down_first=schedule == "rectangular")) is not None:
            trial = Trial(schedule=schedule, scale=scale, **window)
            found[trial] = tried[scale] = measure(trial)
        start = min(tried, key=lambda scale: (tried[scale], scale))
    return min(found, key=lambda trial: (found[trial], trial.scale))


def search_guidance(setup: GenerationSetup, out: Path, launcher: Launcher, *, schedule: str, start: float,
                    window_start: float | None = None, keep_samples: bool = False) -> tuple[Trial, dict[str, float]]:
    """Search, and return the best setting with its figures; everything is kept in `out`, in search.csv as a table.

    Raises InputError for a schedule or start that is not searched, and for an `out` of another search.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"the schedule is {schedule!r}; the search knows {', '.join(SCHEDULES)}")
    if start < 1 or round(start / SCALE_STEP, 6) % 1:
        raise InputError(f"the search starts at {start}; scales are multiples of {SCALE_STEP}, at least 1")
    with owned(out):
        _claim(setup, out)
        return _search(setup, out, launcher, schedule, start, window_start, keep_samples)


def _search(setup: GenerationSetup, out: Path, launcher: Launcher, schedule: str, start: float,
            window_start: float | None, keep_samples: bool) -> tuple[Trial, dict[str, float]]:
    trials: dict[Trial, dict[str, float]] = {}

    def measure(trial: Trial) -> float:
        folder = out / trial.name
        launcher.run(generation_stages(setup, trial, folder))
        if not keep_samples:
            remove_samples(folder)
        figures = read_figures(folder)
        assert figures is not None, f"the stages of {folder} ended without figures"
        trials[trial] = figures
        write_atomically(out / "search.csv", _table(trials).encode())
        return figure(figures, "gfid")

    best = climb(schedule, start, window_start, measure)
    write_atomically(out / "best.json",
                     (json.dumps({**asdict(best), "figures": trials[best]}, indent=2) + "\n").encode())
    return best, trials[best]


def figure(figures: Mapping[str, float], kind: str) -> float:
    """The one figure whose name begins so: `gfid` finds gfid_adm50k."""
    return next(value for name, value in figures.items() if name.startswith(kind + "_"))


def _claim(setup: GenerationSetup, out: Path) -> None:
    record = {"gpt_sha256": checkpoint_hash(setup.gpt), "tokenizer_sha256": checkpoint_hash(setup.tokenizer),
              "reference": sha256(setup.reference) if setup.reference.is_file() else str(setup.reference),
              "count": setup.count, "seed": setup.seed, "dtype": setup.dtype}
    file = out / "search.json"
    if file.is_file():
        other = read_json(file)
        wrong = [name for name in record if other.get(name) != record[name]]
        if wrong:
            raise InputError(f"{out} holds a search with another {wrong[0]}; choose another --out")
    elif not is_unused(out):
        raise InputError(f"{out} is not empty and holds no search; choose another --out")
    write_atomically(file, (json.dumps(record, indent=2) + "\n").encode())


def _table(trials: Mapping[Trial, Mapping[str, float]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(COLUMNS)
    for trial, figures in trials.items():
        writer.writerow([trial.annotation, trial.scale, trial.schedule, *(figure(figures, kind) for kind in _FIGURES)])
    return buffer.getvalue()
