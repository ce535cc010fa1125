"""Which checkpoints of a run stay."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from gigatok_ds.checkpoint.run_directory import REMOVED, complete_checkpoints, read_state
from gigatok_ds.config.checkpoint import CheckpointConfig
from gigatok_ds.errors import InputError


def steps_to_keep(metrics: dict[int, dict[str, float]], config: CheckpointConfig) -> set[int]:
    """The steps whose checkpoints stay, of those whose validation figures are given."""
    kept = set(sorted(metrics)[-config.keep:])
    if config.keep_every:
        kept |= {step for step in metrics if step % config.keep_every == 0}
    if config.keep_best:
        sign = 1 if config.best == "lowest" else -1
        judged = [(sign * figures[config.best_metric], -step) for step, figures in metrics.items()
                  if config.best_metric in figures]
        kept |= {-step for _, step in sorted(judged)[: config.keep_best]}
    return kept


def prune(run_dir: Path, config: CheckpointConfig) -> None:
    """Remove the complete checkpoints that need not stay. Each stops counting as complete before it is touched."""
    found = dict(complete_checkpoints(run_dir))
    kept = steps_to_keep({step: _metrics(folder) for step, folder in found.items()}, config)
    for step, folder in found.items():
        if step not in kept:
            discard(folder)


def discard(folder: Path) -> None:
    aside = folder.with_name(folder.name + REMOVED)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def _metrics(folder: Path) -> dict[str, float]:
    try:
        return read_state(folder).metrics
    except InputError:  # damaged: it counts by its age only
        return {}
