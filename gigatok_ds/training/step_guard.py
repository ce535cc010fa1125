"""Between a step's backward passes and its updates: may it change the weights? One answer, for all ranks and networks."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Literal

import torch
from torch import Tensor

from gigatok_ds.config.faults import FaultConfig
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.training.engine import Engine
from gigatok_ds.training.term_gradients import PREFIX

WINDOW = 100  # steps whose losses a spike is told from
ENOUGH = 20  # of them, before anything is called a spike


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step, and why if it does not count."""

    kind: Literal["accept", "skip", "rewind", "stop"]
    reason: str = ""
    # A step that fp16's loss scaling leaves out while it looks for a scale: nobody needs to hear of it.
    expected: bool = False


class StepGuard:
    """Steps the engines, or leaves a step out for all of them; the buffers of their networks are then as before it.

    Decisions follow from what was logged, so `state` belongs into checkpoints: a resumed run decides alike. To decide, one
    small tensor is summed over ranks and read by the host at each step.
    """

    def __init__(self, config: FaultConfig, engines: Mapping[str, Engine], topology: Topology, *, fp16: bool):
        self.config, self.engines, self.topology, self.fp16 = config, engines, topology, fp16
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped = self.in_a_row = 0

    def state(self) -> dict:
        return {"losses": list(self.losses), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: Mapping) -> None:
        """Of what a checkpoint holds; one of a start point holds nothing."""
        self.losses = deque(state.get("losses", ()), maxlen=WINDOW)
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)

    def begin(self) -> None:
        """Before the first forward pass of a step."""
        for engine in self.engines.values():
            engine.remember_buffers()

    def count(self, rates: Mapping[str, float]) -> None:
        """After every backward pass of a step but the last."""
        for name, lr in rates.items():
            self.engines[name].step(lr)

    def finish(self, rates: Mapping[str, float], values: Mapping[str, Tensor]) -> Verdict:
        """Decide about a step with these logged values, and update or leave it out. Collective.

        rates: the learning rate of each engine that has gradients.
        """
        wrong_values, wrong_engines, loss = self._look(rates, values)
        verdict = self._judge(wrong_values, wrong_engines, loss)
        if verdict.kind == "accept":
            self.losses.append(loss)
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += not verdict.expected
        for name, lr in rates.items():
            # In fp16 DeepSpeed leaves the step out itself, and lowers the loss scale.
            if verdict.kind == "accept" or (self.fp16 and name in wrong_engines):
                self.engines[name].step(lr)
            else:
                self.engines[name].drop()
        if verdict.kind != "accept":
            for engine in self.engines.values():
                engine.restore_buffers()
        return verdict

    def _look(self, rates: Mapping[str, float], values: Mapping[str, Tensor]) -> tuple[list[str], list[str], float]:
        """Names of values and of engines with gradients that are not finite on some rank, and the mean loss."""
        # A term's gradient may overflow in fp16, and the step be left out, while training is fine.
        names = sorted(name for name in values if not name.startswith(PREFIX))
        wrong = [~torch.isfinite(values[name]) for name in names] + [~self.engines[name].gradients_finite() for name in rates]
        device = values["loss"].device
        box = torch.stack([*(flag.to(device, torch.float64) for flag in wrong), values["loss"].double()])
        *counts, loss = self.topology.sum_over_ranks(box).tolist()
        found = [name for name, count in zip([*names, *rates], counts, strict=True) if count]
        return ([name for name in found if name in names], [name for name in found if name in rates],
                loss / self.topology.world_size)

    def _judge(self, wrong_values: list[str], wrong_engines: list[str], loss: float) -> Verdict:
        if wrong_values or wrong_engines:
            wrong = [*wrong_values, *(f"the gradient of the {name}" for name in wrong_engines)]
            reason = f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not finite"
            return self._bounded(Verdict("skip", reason, expected=self.fp16 and not wrong_values))
        limit = self._limit()
        if limit is not None and loss > limit:
            reason = (f"a loss of {loss:.4g} is a spike (the last {len(self.losses)} have a mean of {fmean(self.losses):.4g}, "
                      f"and more than {limit:.4g} counts as one: faults.spike_deviations)")
            return self._bounded(Verdict(self.config.on_spike, reason))
        return Verdict("accept")

    def _limit(self) -> float | None:
        """The loss above which a step is a spike; None while nothing is."""
        if self.config.spike_deviations is None or len(self.losses) < ENOUGH:
            return None
        return fmean(self.losses) + self.config.spike_deviations * pstdev(self.losses)

    def _bounded(self, verdict: Verdict) -> Verdict:
        last = self.in_a_row + 1
        if verdict.expected or verdict.kind == "stop" or last < self.config.in_a_row:
            return verdict
        return Verdict("stop", f"{verdict.reason}, {last} time{'s' * (last > 1)} in a row (faults.in_a_row)")
