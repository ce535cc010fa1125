"""Beside the training loop: how fast it is, what it should be warned about, what its outputs look like."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np

from gigatok_ds.config.load import recipe_to_dict, without_secrets
from gigatok_ds.config.recipe import Recipe, TokenizerRecipe
from gigatok_ds.monitoring.alerts import alerts_of
from gigatok_ds.monitoring.flops import StepFlops
from gigatok_ds.monitoring.metrics import Monitor, read_metrics
from gigatok_ds.monitoring.previews import save_preview
from gigatok_ds.monitoring.throughput import Throughput, peak_of
from gigatok_ds.monitoring.wandb_log import WandbRun, wandb_run
from gigatok_ds.parallel.topology import Topology


class Counter(Protocol):
    def of_step(self, step: int) -> StepFlops: ...


class Watched(Protocol):
    """What a task tells about itself."""

    @property
    def flops(self) -> Counter: ...

    def figures(self, step: int) -> dict[str, float]:
        """Figures of the trained network after `step`, alike on all ranks."""

    def preview(self) -> np.ndarray | None:
        """A picture, uint8 (H, W, 3), of what the network makes of a few fixed inputs; None for none. Collective."""


class Watch:
    """Watches one run from `start` on; every rank has one, the first reports."""

    def __init__(self, recipe: Recipe, task: Watched, run_dir: Path, topology: Topology, monitor: Monitor, start: int):
        self.task, self.run_dir, self.topology, self.monitor = task, run_dir, topology, monitor
        unit = "images" if isinstance(recipe, TokenizerRecipe) else "sequences"
        peak = recipe.monitor.peak_tflops or peak_of(topology.device, recipe.training.precision)
        self.throughput = Throughput(topology, unit, recipe.training.global_batch_size, peak)
        self.alerts = alerts_of(recipe)
        if topology.is_first and start:
            for line in read_metrics(run_dir):
                self._warnings(line["step"], line)  # told when it was logged; here for the state it leaves
        self.throughput.start(start)

    def next(self, batches):
        """The next of `batches`; the wait for it is measured."""
        return self.throughput.next(batches)

    def paused(self) -> AbstractContextManager[None]:
        """Within, time does not count as training."""
        return self.throughput.paused()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` of a logging step, and everything else that is known of it; collective."""
        with self.paused():
            flops = self.topology.from_first(self.task.flops.of_step(step) if self.topology.is_first else None)
            figures = self.task.figures(step)
        values = {**values, **figures, **self.throughput.report(step, flops)}
        self.monitor.log(step, values)
        if self.topology.is_first:
            for warning in self._warnings(step, values):
                self.monitor.warn(step, warning)

    def _warnings(self, step: int, values: Mapping[str, float]) -> list[str]:
        return [warning for alert in self.alerts for warning in alert.update(step, values)]

    def show(self, step: int) -> None:
        """Show what the network makes of a few fixed inputs; collective."""
        image = self.task.preview()
        if image is not None and self.topology.is_first:
            save_preview(self.run_dir, step, image)
            self.monitor.image(step, "preview", image)


def wandb_of(recipe: Recipe, run_dir: Path, topology: Topology) -> AbstractContextManager[WandbRun] | None:
    """The run of Weights & Biases that the recipe asks for, to be entered by the first rank; None if it does not."""
    project = recipe.monitor.wandb_project
    if project is None or not topology.is_first:
        return None
    return wandb_run(project, run_dir, name=run_dir.name, recipe=recipe_to_dict(without_secrets(recipe)))
