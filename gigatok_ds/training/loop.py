"""The one training loop. What a step computes is the task's business; how often, how long and what is kept, ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gigatok_ds.checkpoint.class_names import CLASSES_FILE
from gigatok_ds.checkpoint.run_directory import (
    RECIPE_FILE,
    complete_checkpoints,
    damage,
    load_checkpoint,
    remove_leftovers,
    restore,
)
from gigatok_ds.checkpoint.writer import CheckpointWriter
from gigatok_ds.config.deepspeed import scaler_search
from gigatok_ds.config.recipe import Recipe
from gigatok_ds.engine.engine import Engine
from gigatok_ds.errors import InputError
from gigatok_ds.files import naming_failures, written_aside
from gigatok_ds.monitoring.history import record_event
from gigatok_ds.monitoring.loss_term_gradients import norms
from gigatok_ds.monitoring.memory import memory_line, peak_memory
from gigatok_ds.monitoring.metrics import Monitor
from gigatok_ds.monitoring.observer import Watch, Watched, wandb_of
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.resilience.health import check_health
from gigatok_ds.resilience.preemption import REQUEUE, StopRequests
from gigatok_ds.resilience.rank_monitor import End
from gigatok_ds.resilience.step_guard import StepGuard, StepVerdict
from gigatok_ds.resilience.watchdog import Watchdog
from gigatok_ds.streams import stream_key
from gigatok_ds.training.schedules import lr_of_iteration

logger = logging.getLogger(__name__)

PROBE_FILE = "probe.npz"
# Files of the run directory that each checkpoint has a copy of, so that it explains itself.
ATTACHMENTS = (RECIPE_FILE, CLASSES_FILE, "deepspeed.json", "environment.json")


class Task(Watched, Protocol):
    """What is trained: its engines, its data, and one micro batch's forward and backward passes."""

    @property
    def engines(self) -> dict[str, Engine]: ...

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the model's classes, where it has any and their names are known."""

    def micro_batches(self, start_step: int) -> Iterator[dict[str, Tensor]]:
        """This rank's endless stream of micro batches, from the one that `start_step` (0-based) begins with."""

    def train_micro_batch(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Forward and backward passes for a micro batch of `step` (1-based); scalars to log, `loss` among them."""

    def learning_rates(self, step: int, lr: float) -> dict[str, float]:
        """The rate of each engine that has gradients in `step`, given that of the schedule."""

    def validate(self, step: int) -> dict[str, float]:
        """Figures on the validation data after `step`; collective."""

    def probe(self) -> dict[str, np.ndarray]:
        """Outputs on a few fixed inputs, against which an exported model is checked; collective."""


def train(recipe: Recipe, task: Task, run_dir: Path, topology: Topology, settings: dict[str, Any], end: End,
          branch: Path | None = None, *, until: int | None = None) -> None:
    """Train `task` to recipe.training.steps, from the newest complete checkpoint of `run_dir` or else from `branch`.

    settings are DeepSpeed's. A run that stalls is ended by `end`. One that SIGTERM or SIGUSR1 asks to stop saves and
    raises SystemExit(REQUEUE). until: an earlier step to save and end at; such a run is not validated. Afterwards
    `probe.npz` holds the trained model's own outputs on a few inputs.
    """
    guard = StepGuard(recipe.faults, task.engines, topology, fp16=recipe.training.precision == "fp16",
                      scaler_search=scaler_search(settings))
    start = _resume(task, run_dir, topology, guard, branch)
    if start < (until or recipe.training.steps):
        writer = CheckpointWriter(run_dir, recipe.checkpoint, topology, stage=next(iter(task.engines.values())).stage,
                                  attachments=ATTACHMENTS)
        monitor = Monitor(run_dir, enabled=topology.is_first, total_steps=recipe.training.steps, start_step=start,
                          description=recipe.name, wandb=wandb_of(recipe, run_dir, topology))
        watchdog = Watchdog(recipe.monitor.stall_seconds, run_dir, topology.rank, end)
        with monitor, writer, watchdog, StopRequests() as requests:
            _Steps(recipe, task, run_dir, topology, settings["gradient_accumulation_steps"], guard, monitor, writer,
                   watchdog, requests, until).run(start)
    if until:
        return
    probe: dict[str, Any] = task.probe()
    if topology.is_first:
        with naming_failures(run_dir / PROBE_FILE), written_aside(run_dir / PROBE_FILE) as file:
            np.savez(file, **probe)


@dataclass
class _Steps:
    """The steps of one run, and whatever has its turn after some of them."""

    recipe: Recipe
    task: Task
    run_dir: Path
    topology: Topology
    accumulation: int
    guard: StepGuard
    monitor: Monitor
    writer: CheckpointWriter
    watchdog: Watchdog
    requests: StopRequests
    until: int | None  # where to end before the recipe's last step, without validation
    memory_reported: bool = False
    asked: str | None = None  # the signal that ranks have agreed to stop by
    undecided: tuple[int, Window] | None = None  # a step whose verdict is not known yet, and what it logged

    def run(self, start: int) -> None:
        """Steps after `start`, to the last."""
        settings, checkpoint = self.recipe.training, self.recipe.checkpoint
        end = self.until or settings.steps
        batches = self.task.micro_batches(start)
        watch = Watch(self.recipe, self.task, self.run_dir, self.topology, self.monitor, start)
        window = Window()
        pauses = (settings.log_every, settings.validate_every, checkpoint.every, self.recipe.faults.compare_every)
        for step in range(start + 1, end + 1):
            self.writer.check()
            self.watchdog.beat(step)
            last = step == end
            lr = lr_of_iteration(self.recipe.schedule, self.recipe.optimizer.lr, settings.steps, step - 1)
            self._step(watch, batches, step, lr, window)
            if last or self.asked or not self.guard.on_device or any(step % every == 0 for every in pauses):
                self._hear_verdict(watch, window)
            if step % settings.log_every == 0 or last:
                self._log(watch, window, step, lr)
            self.watchdog.beat(step)
            figures: dict[str, float] = {}
            if (step % settings.validate_every == 0 or last) and not self.until:
                with watch.paused():
                    figures = self._validate(watch, step)
            asked = None if last else self.asked
            saves = step % checkpoint.every == 0 or last or asked
            if saves or step % self.recipe.faults.compare_every == 0:
                with watch.paused():
                    check_health(self.task.engines, step, self.run_dir, self.topology)
            if saves:
                with watch.paused():
                    self._save(step, figures)
            if asked:
                self._stop(asked, step)

    def _step(self, watch: Watch, batches: Iterator[dict[str, Tensor]], step: int, lr: float, window: Window) -> None:
        """All micro batches of a step, and its update unless it is left out; `_hear_verdict` says which."""
        values, rates = Window(), self.task.learning_rates(step, lr)
        self.guard.begin()
        for micro in range(self.accumulation):
            # For what draws from torch's own generator: a resumed run draws what the uninterrupted one would have.
            torch.manual_seed(stream_key(self.recipe.training.seed, "torch", step, micro, self.topology.rank))
            values.add(self.task.train_micro_batch(watch.next(batches), step))
            if micro < self.accumulation - 1:
                self.guard.count(rates)
        # By now the device has this step to work on, so that hearing about the one before keeps it waiting for nothing.
        self._hear_verdict(watch, window)
        self.guard.decide(rates, values.means(), self.requests.received)
        self.undecided = step, values

    def _hear_verdict(self, watch: Watch, window: Window) -> None:
        """What has become of the undecided step, if there is one."""
        if self.undecided is None:
            return
        (step, values), self.undecided = self.undecided, None
        verdict = self.guard.verdict()
        self.asked = self.asked or verdict.asked
        if verdict.kind == "accept":
            window.merge(values)
        elif not verdict.expected:
            with watch.paused():
                self._leave_out(verdict, step)

    def _leave_out(self, verdict: StepVerdict, step: int) -> None:
        """Say that a step does not count and, if its verdict is more than that, go back or end the run."""
        text, event = f"left out, since {verdict.reason}", "skipped"
        if verdict.kind != "skip":
            self.writer.finish()
            found = complete_checkpoints(self.run_dir) if self.topology.is_first else []
            newest = self.topology.from_first(str(found[-1][1]) if found else None)
            if verdict.kind == "stop" or newest is None:
                saved = f"the newest checkpoint is {newest}" if newest else "nothing is saved"
                raise InputError(
                    f"step {step}: {verdict.reason}; {saved}: lower optimizer.lr, or go on from there with "
                    "training.precision=fp32 to find the cause"
                )
            self._rewind(Path(newest))
            text, event = f"back to the state of {newest}, since {verdict.reason}", "rewound"
        self.monitor.warn(step, text)
        self._report(event, step=step, reason=verdict.reason)

    def _rewind(self, checkpoint: Path) -> None:
        """Take weights and optimizer from `checkpoint`; what has been left out so far still counts."""
        counted = {"skipped": self.guard.skipped, "in_a_row": self.guard.in_a_row, "searched": self.guard.searched}
        self.guard.restore(load_checkpoint(checkpoint, self.task.engines, self.topology).guard | counted)

    def _log(self, watch: Watch, window: Window, step: int, lr: float) -> None:
        means = norms(window.mean(self.topology))
        of_engines = {f"grad_norm/{name}": norm for name, engine in self.task.engines.items()
                      if (norm := engine.gradient_norm()) is not None}
        left_out = self.guard.skipped
        skipped = {"skipped_steps": left_out, "skipped_share": left_out / step} if left_out else {}
        peak = self.topology.max_over_ranks(peak_memory(self.topology.device))
        watch.log(step, means | of_engines | skipped | {"lr": lr, "memory/peak_gb": peak})
        shown = {name: means[name] for name in ("loss",) if name in means}
        self.monitor.progress(step, shown | ({"left_out": left_out / step} if left_out else {}))
        if not self.memory_reported:
            self.monitor.note(memory_line(peak, next(iter(self.task.engines.values())).stage, self.recipe))
            self.memory_reported = True

    def _validate(self, watch: Watch, step: int) -> dict[str, float]:
        figures = self.task.validate(step)
        _refuse_unknown_metric(self.recipe.checkpoint.best_metric, figures)
        self.monitor.log(step, {f"validation/{name}": value for name, value in figures.items()})
        watch.show(step)
        return figures

    def _save(self, step: int, figures: dict[str, float]) -> None:
        seen = step * self.recipe.training.global_batch_size
        self.writer.save(step, seen, self.task.engines, figures, self.guard.state())
        self._report("saved", step=step)

    def _stop(self, signal: str, step: int) -> None:
        """End a run that was asked to, once its checkpoint is complete."""
        self.writer.finish()
        self._report("stopped", step=step, reason=signal)
        if self.topology.is_first:
            logger.info("stopped by %s: step %d is saved, and the same command goes on from there (exit code %d)",
                        signal, step, REQUEUE)
        raise SystemExit(REQUEUE)

    def _report(self, event: str, **what) -> None:
        if self.topology.is_first:
            record_event(self.run_dir, event, **what)


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
        return dict(zip(means, topology.mean_over_ranks(torch.stack(list(means.values()))).tolist(), strict=True))


def _resume(task: Task, run_dir: Path, topology: Topology, guard: StepGuard, branch: Path | None) -> int:
    """Load the newest whole checkpoint that the first rank sees, or that of another run, on all ranks; 0 without any.
    """
    if topology.is_first:
        remove_leftovers(run_dir)
    found = topology.from_first([str(path) for _, path in complete_checkpoints(run_dir)]
                                or ([str(branch)] if branch else []))
    while found:
        newest = Path(found.pop())
        problem = damage(newest, topology)
        if problem is None:
            state = restore(newest, task.engines)
            guard.restore(state.guard)
            if topology.is_first:
                logger.info("resuming from %s", newest)
            return state.step
        if not found:
            raise InputError(problem)
        if topology.is_first:
            logger.warning("%s. Going on from the checkpoint before", problem)
            record_event(run_dir, "damaged", reason=problem)
    return 0


def _refuse_unknown_metric(name: str | None, figures: dict[str, float]) -> None:
    if name is not None and name not in figures:
        raise InputError(f"checkpoint.best_metric is {name}, which is not measured; "
                         f"measured are {', '.join(sorted(figures))}")
