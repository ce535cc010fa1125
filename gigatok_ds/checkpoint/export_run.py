"""From a training run to a standalone checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gigatok_ds.checkpoint.model_sources import open_run
from gigatok_ds.checkpoint.standalone import save_standalone


def export_run(run_dir: Path, out: Path, *, choice: Literal["ema", "model"] | None = None,
               overwrite: bool = False) -> Path:
    """Write the newest complete checkpoint of a run as a standalone checkpoint and return its path.

    choice is which weights to write: by default the moving average where the run kept one. Raises InputError when the
    run has no checkpoint, one that does not fit its recipe, or no average and one is asked for.
    """
    model = open_run(run_dir, choice=choice)
    return save_standalone(out, model.config, model.weights, provenance=model.provenance, classes=model.classes,
                           overwrite=overwrite)
