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

from gigatok_ds.checkpoint.run_directory import (
    RECIPE_FILE,
    complete_checkpoints,
    damage,
    load_checkpoint,
    remove_leftovers,
    restore,
)
from gigatok_ds.checkpoint.writer import CheckpointWriter
from gigatok_ds.config.recipe import Recipe
from gigatok_ds.errors import InputError
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.streams import stream_key
from gigatok_ds.training.engine import Engine
from gigatok_ds.training.faults import End
from gigatok_ds.training.health import check_health
from gigatok_ds.training.history import tell
from gigatok_ds.training.memory import memory_line, peak_memory
from gigatok_ds.training.monitor import Monitor
from gigatok_ds.training.schedules import lr_of_iteration
from gigatok_ds.training.step_guard import StepGuard, Verdict
from gigatok_ds.training.stop_requests import REQUEUE, StopRequests
from gigatok_ds.training.term_gradients import norms
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

    def train_micro_batch(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Forward and backward passes for a micro batch of `step` (1-based); scalars to log, `loss` among them."""

    def learning_rates(self, step: int, lr: float) -> dict[str, float]:
        """Of each engine that has gradients in `step`, given that of the schedule."""

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
    guard = StepGuard(recipe.faults, task.engines, topology, fp16=recipe.training.precision == "fp16")
    start = _resume(task, run_dir, topology, guard, branch)
    if start < recipe.training.steps:
        writer = CheckpointWriter(run_dir, recipe.checkpoint, topology, stage=next(iter(task.engines.values())).stage,
                                  attachments=ATTACHMENTS)
        monitor = Monitor(run_dir, enabled=topology.is_first, total_steps=recipe.training.steps, start_step=start,
                          description=recipe.name, wandb=wandb_of(recipe, run_dir, topology))
        watchdog = Watchdog(recipe.monitor.stall_seconds, run_dir, topology.rank, end)
        with monitor, writer, watchdog, StopRequests(topology) as requests:
            _run_steps(recipe, task, run_dir, topology, accumulation, start, guard, monitor, writer, watchdog, requests)
    probe = task.probe()
    if topology.is_first:
        scratch = run_dir / "probe.partial.npz"
        np.savez(scratch, **probe)
        os.replace(scratch, run_dir / "probe.npz")


def _run_steps(recipe: Recipe, task: Task, run_dir: Path, topology: Topology, accumulation: int, start: int,
               guard: StepGuard, monitor: Monitor, writer: CheckpointWriter, watchdog: Watchdog,
               requests: StopRequests) -> None:
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
        values, verdict = _step(task, guard, watch, batches, settings.seed, step, lr, accumulation, topology.rank)
        if verdict.kind == "accept":
            window.merge(values)
        else:
            with watch.paused():
                _leave_out(verdict, step, task, guard, run_dir, topology, monitor, writer)
        if step % settings.log_every == 0 or last:
            means = norms(window.mean(topology))
            of_engines = {f"grad_norm/{name}": norm for name, engine in task.engines.items()
                          if (norm := engine.gradient_norm()) is not None}
            skipped = {"skipped_steps": guard.skipped} if guard.skipped else {}
            peak = topology.max_over_ranks(peak_memory(topology.device))
            watch.log(step, means | of_engines | skipped | {"lr": lr, "memory/peak_gb": peak})
            monitor.progress(step, {name: means[name] for name in ("loss",) if name in means})
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
        saves = step % recipe.checkpoint.every == 0 or last or asked
        if saves or step % recipe.faults.compare_every == 0:
            with watch.paused():
                check_health(task.engines, step, run_dir, topology)
        if saves:
            with watch.paused():
                writer.save(step, step * settings.global_batch_size, task.engines, figures, guard.state())
            if topology.is_first:
                tell(run_dir, "saved", step=step)
        if asked:
            _stop(asked, step, run_dir, topology, writer)


def _step(task: Task, guard: StepGuard, watch: Watch, batches: Iterator[dict[str, Tensor]], seed: int, step: int, lr: float,
          accumulation: int, rank: int) -> tuple[Window, Verdict]:
    """All micro batches of a step, and its update unless it is left out."""
    values, rates = Window(), task.learning_rates(step, lr)
    guard.begin()
    for micro in range(accumulation):
        # For what draws from torch's own generator: a resumed run draws what the uninterrupted one would have.
        torch.manual_seed(stream_key(seed, "torch", step, micro, rank))
        values.add(task.train_micro_batch(watch.next(batches), step))
        if micro < accumulation - 1:
            guard.count(rates)
    return values, guard.finish(rates, values.means())


def _leave_out(verdict: Verdict, step: int, task: Task, guard: StepGuard, run_dir: Path, topology: Topology,
               monitor: Monitor, writer: CheckpointWriter) -> None:
    """Say that a step does not count and, if its verdict is more than that, go back or end the run."""
    if verdict.expected:
        return
    if verdict.kind != "skip":
        writer.finish()
    found = complete_checkpoints(run_dir) if verdict.kind != "skip" and topology.is_first else []
    newest = topology.from_first(str(found[-1][1]) if found else None)
    if verdict.kind == "stop" or (verdict.kind == "rewind" and newest is None):
        raise InputError(f"step {step}: {verdict.reason}; {f'the newest checkpoint is {newest}' if newest else 'nothing is saved'}: "
                         "lower optimizer.lr, or go on from there with training.precision=fp32 to find the cause")
    text, event = f"left out, since {verdict.reason}", "skipped"
    if verdict.kind == "rewind":
        guard.restore(load_checkpoint(Path(newest), task.engines, topology).guard | {"skipped": guard.skipped,
                                                                                    "in_a_row": guard.in_a_row})
        text, event = f"back to the state of {newest}, since {verdict.reason}", "rewound"
    monitor.warn(step, text)
    if topology.is_first:
        tell(run_dir, event, step=step, reason=verdict.reason)


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

    def merge(self, other: Window) -> None:
        """Take in what another window has seen."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]

    def means(self) -> dict[str, Tensor]:
        """Means over the window, of this rank."""
        return {name: self.sums[name] / self.counts[name] for name in sorted(self.sums)}

    def mean(self, topology: Topology) -> dict[str, float]:
        """Means over the window and over ranks, nothing of an empty one; empties the window."""
        means = self.means()
        self.sums, self.counts = {}, {}
        if not means:
            return {}
        return dict(zip(means, topology.mean_over_ranks(torch.stack(list(means.values()))).tolist()))


def _resume(task: Task, run_dir: Path, topology: Topology, guard: StepGuard, branch: Path | None) -> int:
    """Load the newest whole checkpoint that the first rank sees, or that of another run, on all ranks; 0 without any."""
    if topology.is_first:
        remove_leftovers(run_dir)
    found = topology.from_first([str(path) for _, path in complete_checkpoints(run_dir)] or ([str(branch)] if branch else []))
    while found:
        newest = Path(found.pop())
        problem = damage(newest, topology)
        if problem is None:
            state = restore(newest, task.engines)
            guard.restore(state.guard)
            if topology.is_first:
                print(f"resuming from {newest}", file=sys.stderr)
            return state.step
        if not found:
            raise InputError(problem)
        if topology.is_first:
            print(f"warning: {problem}. Going on from the checkpoint before", file=sys.stderr)
            tell(run_dir, "damaged", reason=problem)
    return 0


def _refuse_unknown_metric(name: str | None, figures: dict[str, float]) -> None:
    if name is not None and name not in figures:
        raise InputError(f"checkpoint.best_metric is {name}, which is not measured; "
                         f"measured are {', '.join(sorted(figures))}")
