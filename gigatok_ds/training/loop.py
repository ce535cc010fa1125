"""The one training loop. What a step computes is the task's business; how often, how long and what is kept, ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gigatok_ds.checkpoint.run_directory import RECIPE_FILE, complete_checkpoints, load_checkpoint, remove_leftovers
from gigatok_ds.checkpoint.writer import CheckpointWriter
from gigatok_ds.config.recipe import Recipe
from gigatok_ds.errors import InputError
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.streams import stream_key
from gigatok_ds.training.engine import Engine
from gigatok_ds.training.faults import End
from gigatok_ds.training.history import tell
from gigatok_ds.training.memory import memory_line, peak_memory
from gigatok_ds.training.monitor import NOT_FINITE, Monitor
from gigatok_ds.training.schedules import lr_of_iteration
from gigatok_ds.training.stop_requests import REQUEUE, StopRequests
from gigatok_ds.training.term_gradients import PREFIX, norms
from gigatok_ds.training.watch import Watch, Watched, wandb_of
from gigatok_ds.training.watchdog import Watchdog

# Files of the run directory that each checkpoint has a copy of, so that it explains itself.
ATTACHMENTS = (RECIPE_FILE, "deepspeed.json", "environment.json")


class Task(Watched, Protocol):
    """What is trained: its engines, its data, and one micro batch's forward and backward passes."""

    engines: dict[str, Engine]

    def data_identity(self) -> str:
        """What tells the training data from any other; see ShardIndex.identity."""

    def micro_batches(self, start_step: int) -> Iterator[dict[str, Tensor]]:
        """This rank's endless stream of micro batches, from the one that `start_step` (0-based) begins with."""

    def train_micro_batch(self, batch: dict[str, Tensor], step: int, lr: float) -> dict[str, Tensor]:
        """Forward, backward and engine steps for a micro batch of `step` (1-based); scalars to log."""

    def validate(self, step: int) -> dict[str, float]:
        """Figures on the validation data after `step`; collective."""

    def probe(self) -> dict[str, np.ndarray]:
        """Outputs on a few fixed inputs, against which an exported model is checked; collective."""


def train(recipe: Recipe, task: Task, run_dir: Path, topology: Topology, accumulation: int, end: End,
          branch: Path | None = None) -> None:
    """Train `task` to recipe.training.steps, from the newest complete checkpoint of `run_dir` or else from `branch`.

    A run that stalls is ended by `end`. One that SIGTERM or SIGUSR1 asks to stop saves and raises SystemExit(REQUEUE).
    Afterwards `probe.npz` holds the trained model's own outputs on a few inputs.
    """
    start = _resume(task, run_dir, topology, branch)
    if start < recipe.training.steps:
        writer = CheckpointWriter(run_dir, recipe.checkpoint, topology, stage=next(iter(task.engines.values())).stage,
                                  attachments=ATTACHMENTS)
        monitor = Monitor(run_dir, enabled=topology.is_first, total_steps=recipe.training.steps, start_step=start,
                          description=recipe.name, wandb=wandb_of(recipe, run_dir, topology))
        watchdog = Watchdog(recipe.monitor.stall_seconds, run_dir, topology.rank, end)
        with monitor, writer, watchdog, StopRequests(topology) as requests:
            _run_steps(recipe, task, run_dir, topology, accumulation, start, monitor, writer, watchdog, requests)
    probe = task.probe()
    if topology.is_first:
        scratch = run_dir / "probe.partial.npz"
        np.savez(scratch, **probe)
        os.replace(scratch, run_dir / "probe.npz")


def _run_steps(recipe: Recipe, task: Task, run_dir: Path, topology: Topology, accumulation: int, start: int,
               monitor: Monitor, writer: CheckpointWriter, watchdog: Watchdog, requests: StopRequests) -> None:
    settings = recipe.training
    batches = task.micro_batches(start)
    window, told_memory = Window(), False
    watch = Watch(recipe, task, run_dir, topology, monitor, start)
    for step in range(start + 1, settings.steps + 1):
        writer.check()
        watchdog.beat(step)
        figures: dict[str, float] = {}
        last = step == settings.steps
        lr = lr_of_iteration(recipe.schedule, recipe.optimizer.lr, settings.steps, step - 1)
        for micro in range(accumulation):
            # For what draws from torch's own generator: a resumed run draws what the uninterrupted one would have.
            torch.manual_seed(stream_key(settings.seed, "torch", step, micro, topology.rank))
            window.add(task.train_micro_batch(watch.next(batches), step, lr))
        if step % settings.log_every == 0 or last:
            values = norms(window.mean(topology))
            _refuse_non_finite(values, step)
            of_engines = {f"grad_norm/{name}": norm for name, engine in task.engines.items()
                          if (norm := engine.gradient_norm()) is not None}
            peak = topology.max_over_ranks(peak_memory(topology.device))
            watch.log(step, values | of_engines | {"lr": lr, "memory/peak_gb": peak})
            monitor.progress(step, {"loss": values["loss"]})
            if not told_memory:
                monitor.note(memory_line(peak, next(iter(task.engines.values())).stage, recipe))
                told_memory = True
        watchdog.beat(step)
        if step % settings.validate_every == 0 or last:
            with watch.paused():
                figures = task.validate(step)
                _refuse_unknown_metric(recipe.checkpoint.best_metric, figures)
                monitor.log(step, {f"validation/{name}": value for name, value in figures.items()})
                watch.show(step)
        asked = None if last else requests.agreed()
        if step % recipe.checkpoint.every == 0 or last or asked:
            _refuse_non_finite(norms(window.so_far(topology)) | _gradient_norms(task, settings.precision), step)
            with watch.paused():
                writer.save(step, step * settings.global_batch_size, task.engines, figures)
            if topology.is_first:
                tell(run_dir, "saved", step=step)
        if asked:
            _stop(asked, step, run_dir, topology, writer)


def _stop(signal: str, step: int, run_dir: Path, topology: Topology, writer: CheckpointWriter) -> None:
    """End a run that was asked to, once its checkpoint is complete."""
    writer.finish()
    if topology.is_first:
        tell(run_dir, "stopped", step=step, reason=signal)
        print(f"stopped by {signal}: step {step} is saved, and the same command goes on from there (exit code {REQUEUE})",
              file=sys.stderr)
    raise SystemExit(REQUEUE)


class Window:
    """Running means of logged scalars, kept on the device so that only logging steps synchronise."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def mean(self, topology: Topology) -> dict[str, float]:
        """Means over the window and over ranks; empties the window."""
        means = self.so_far(topology)
        self.sums, self.counts = {}, {}
        return means

    def so_far(self, topology: Topology) -> dict[str, float]:
        """The same, of a window that goes on; nothing of an empty one."""
        names = sorted(self.sums)
        if not names:
            return {}
        means = torch.stack([self.sums[name] / self.counts[name] for name in names])
        return dict(zip(names, topology.mean_over_ranks(means).tolist()))


def _resume(task: Task, run_dir: Path, topology: Topology, branch: Path | None) -> int:
    """Load the newest checkpoint that the first rank sees, or that of another run, on all ranks; 0 when there is none."""
    if topology.is_first:
        remove_leftovers(run_dir)
    found = complete_checkpoints(run_dir)
    newest = topology.from_first(str(found[-1][1] if found else branch) if found or branch else None)
    if newest is None:
        return 0
    step = load_checkpoint(Path(newest), task.engines, topology)
    if topology.is_first:
        print(f"resuming from {newest}", file=sys.stderr)
    return step


def _refuse_unknown_metric(name: str | None, figures: dict[str, float]) -> None:
    if name is not None and name not in figures:
        raise InputError(f"checkpoint.best_metric is {name}, which is not measured; "
                         f"measured are {', '.join(sorted(figures))}")


def _gradient_norms(task: Task, precision: str) -> dict[str, float]:
    """Those of the last step that tell whether the weights can be kept: under fp16 a step that overflows is left out."""
    if precision == "fp16":
        return {}
    return {f"the gradient of {name}": norm for name, engine in task.engines.items()
            if (norm := engine.gradient_norm()) is not None}


def _refuse_non_finite(values: dict[str, float], step: int) -> None:
    # A term's gradient may overflow in fp16, and the step be left out, while training is fine.
    bad = [name for name, value in values.items() if not np.isfinite(value) and not name.startswith(PREFIX)]
    if bad:
        raise InputError(
            f"step {step}: {', '.join(bad)} is not finite; lower optimizer.lr, or continue from the last checkpoint "
            "with training.precision=fp32 to find the cause"
            + (f" ({values[NOT_FINITE]:.3g} latents per micro batch are not)" if values.get(NOT_FINITE) else "")
        )
