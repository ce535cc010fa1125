"""Weights & Biases as a second place for what a run logs, by `monitor.wandb_project`."""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gigatok_ds.errors import InputError
from gigatok_ds.files import write_atomically

ID_FILE = "wandb_id"


class WandbRun(Protocol):
    """The part of wandb's run that we use."""

    def log(self, data: dict[str, Any]) -> None: ...


def check_wandb(project: str | None) -> None:
    """InputError when a project is named and the package is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise InputError(f"monitor.wandb_project is {project}, but the package wandb is not installed; "
                         "pip install wandb, or set monitor.wandb_project=null")


@contextlib.contextmanager
def wandb_run(project: str, run_dir: Path, *, name: str, recipe: dict) -> Iterator[WandbRun]:
    """A run of `project` with the recipe as its configuration. Its id is kept in the run directory: a resumed run
    continues it. WANDB_MODE=offline keeps everything below `run_dir`/wandb.

    Everything is logged over the field "step", since wandb's own count cannot go back to the last checkpoint.
    """
    import wandb

    run = wandb.init(project=project, id=_run_id(run_dir), resume="allow", dir=str(run_dir), name=name, config=recipe,
                     settings=wandb.Settings(console="off", disable_git=True, disable_code=True, silent=True))
    try:
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def as_wandb_image(image: np.ndarray) -> object:
    import wandb

    return wandb.Image(image)


def _run_id(run_dir: Path) -> str:
    path = run_dir / ID_FILE
    if not path.is_file():
        write_atomically(path, f"{secrets.token_hex(4)}\n".encode())
    return path.read_text(encoding="utf-8").strip()
