"""Between a step's backward passes and its updates: may it change the weights? One answer, for all ranks and networks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, pstdev
from typing import Literal

import torch
from torch import Tensor

from gigatok_ds.config.faults import FaultConfig
from gigatok_ds.engine.engine import Engine
from gigatok_ds.monitoring.loss_term_gradients import PREFIX
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.resilience.preemption import SIGNALS

WINDOW = 100  # steps whose losses a spike is told from
ENOUGH = 20  # of them, before anything is called a spike


@dataclass(frozen=True)
class StepVerdict:
    """What becomes of a step, and why if it does not count."""

    kind: Literal["accept", "skip", "rewind", "stop"]
    reason: str = ""
    # A step that fp16's loss scaling leaves out while it looks for a scale: nobody needs to hear of it.
    expected: bool = False
    # The signal that asks the run to stop, of those that ranks had received when they decided.
    asked: str | None = field(default=None, compare=False)


class StepGuard:
    """Steps the engines, or leaves a step out for all of them; the buffers of their networks are then as before it.

    Decisions follow from what was logged, so `state` belongs into checkpoints: a resumed run decides alike. To decide,
    one small tensor is summed over ranks at each step. The device itself leaves the update out, and the host reads the
    tensor when it wants to know, a step later as a rule. It reads at once where it must decide: in fp16, where it
    scales the loss, with offload, where it updates, and with faults.spike_deviations, which the losses before this one
    define.
    """

    def __init__(self, config: FaultConfig, engines: Mapping[str, Engine], topology: Topology, *, fp16: bool,
                 scaler_search: int = 0):
        """scaler_search: how many steps in a row fp16's loss scaling may leave out while it looks for a scale."""
        self.config, self.engines, self.topology, self.fp16 = config, engines, topology, fp16
        self.on_device = (not fp16 and config.spike_deviations is None
                          and all(engine.decides_on_device for engine in engines.values()))
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.scaler_search = scaler_search
        self.skipped = self.in_a_row = self.searched = 0
        self._undecided: _Question | None = None

    def state(self) -> dict:
        return {"losses": list(self.losses), "skipped": self.skipped, "in_a_row": self.in_a_row,
                "searched": self.searched}

    def restore(self, state: Mapping) -> None:
        """Take up what a checkpoint holds; one of a start point holds nothing."""
        self.losses = deque(state.get("losses", ()), maxlen=WINDOW)
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
        self.searched = state.get("searched", 0)

    def begin(self) -> None:
        """Before the first forward pass of a step."""
        for engine in self.engines.values():
            engine.remember_buffers()

    def count(self, rates: Mapping[str, float]) -> None:
        """Count a micro batch, after every backward pass of a step but the last."""
        for name, lr in rates.items():
            self.engines[name].step(lr)

    def finish(self, rates: Mapping[str, float], values: Mapping[str, Tensor], received: int = 0) -> StepVerdict:
        """`decide` about a step and wait for its verdict."""
        self.decide(rates, values, received)
        return self.verdict()

    def decide(self, rates: Mapping[str, float], values: Mapping[str, Tensor], received: int = 0) -> None:
        """Update with these logged values, or leave the step out; `verdict` has to follow before the next one.
        Collective.

        rates: the learning rate of each engine that has gradients. received: the signal that this rank has received, or
        0.
        """
        assert self._undecided is None, "the verdict on the step before was not asked for"
        self._undecided = self._ask(rates, values, received)
        if self.on_device:
            wrong = self._undecided.answer[:self._undecided.flags].any()
            left_out = wrong.float()
            for name, lr in rates.items():
                self.engines[name].step(lr, left_out)
            for engine in self.engines.values():
                engine.restore_buffers(wrong)
        self._undecided.send()

    def verdict(self) -> StepVerdict:
        """What has become of the step that was decided last. Waits until the device has come that far."""
        question, self._undecided = self._undecided, None
        assert question is not None, "there is no step to tell of"
        wrong_values, wrong_engines, loss, asked = question.read(self.topology.world_size)
        verdict = replace(self._assess(wrong_values, wrong_engines, loss), asked=asked)
        if verdict.kind == "accept":
            self.losses.append(loss)
            self.in_a_row = self.searched = 0
        else:
            self.skipped += 1
            self.in_a_row += not verdict.expected
            self.searched += verdict.expected
        if not self.on_device:
            self._carry_out(verdict, question.rates, wrong_engines)
        elif verdict.kind != "accept":
            for name in question.rates:
                self.engines[name].count_left_out()
        return verdict

    def _carry_out(self, verdict: StepVerdict, rates: Mapping[str, float], wrong_engines: Sequence[str]) -> None:
        for name, lr in rates.items():
            # In fp16 DeepSpeed leaves the step out itself, and lowers the loss scale.
            if verdict.kind == "accept" or (self.fp16 and name in wrong_engines):
                self.engines[name].step(lr)
            else:
                self.engines[name].drop()
        if verdict.kind != "accept":
            for engine in self.engines.values():
                engine.restore_buffers()

    def _ask(self, rates: Mapping[str, float], values: Mapping[str, Tensor], received: int) -> _Question:
        """All ranks: which values, and whose gradients, are not finite, what the loss is, and which signals there are.
        """
        # A term's gradient may overflow in fp16, and the step be left out, while training is fine.
        names = sorted(name for name in values if not name.startswith(PREFIX))
        wrong = [*(~torch.isfinite(values[name]) for name in names),
                 *(~self.engines[name].gradients_finite() for name in rates)]
        device = values["loss"].device
        signals = [torch.full((), float(received == number), dtype=torch.float64, device=device) for number in SIGNALS]
        box = torch.stack([*(flag.to(device, torch.float64) for flag in wrong), values["loss"].double(), *signals])
        return _Question(names=names, rates=rates, answer=self.topology.sum_over_ranks(box))

    def _assess(self, wrong_values: list[str], wrong_engines: list[str], loss: float) -> StepVerdict:
        if wrong_values or wrong_engines:
            wrong = [*wrong_values, *(f"the gradient of the {name}" for name in wrong_engines)]
            reason = f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not finite"
            return self._bounded(StepVerdict("skip", reason,
                                             expected=not wrong_values and self.searched < self.scaler_search))
        limit = self._limit()
        if limit is not None and loss > limit:
            reason = (f"a loss of {loss:.4g} is a spike (the last {len(self.losses)} have a mean of "
                      f"{fmean(self.losses):.4g}, and more than {limit:.4g} counts as one: faults.spike_deviations)")
            return self._bounded(StepVerdict(self.config.on_spike, reason))
        return StepVerdict("accept")

    def _limit(self) -> float | None:
        """The loss above which a step is a spike; None while nothing is."""
        if self.config.spike_deviations is None or len(self.losses) < ENOUGH:
            return None
        return fmean(self.losses) + self.config.spike_deviations * pstdev(self.losses)

    def _bounded(self, verdict: StepVerdict) -> StepVerdict:
        last = self.in_a_row + 1
        if verdict.expected or verdict.kind == "stop" or last < self.config.in_a_row:
            return verdict
        return StepVerdict("stop", f"{verdict.reason}, {last} time{'s' * (last > 1)} in a row (faults.in_a_row)")


@dataclass(kw_only=True)
class _Question:
    """What ranks were asked about a step: for each of `names` and `rates` how many ranks found it wrong, the sum of
    their losses, and how many have received each of SIGNALS."""

    names: Sequence[str]
    rates: Mapping[str, float]
    answer: Tensor
    arrived: torch.cuda.Event | None = None

    @property
    def flags(self) -> int:
        return len(self.names) + len(self.rates)

    def send(self) -> None:
        """Start the answer on its way to the host."""
        if self.answer.device.type == "cuda":
            pinned = torch.empty_like(self.answer, device="cpu", pin_memory=True)
            self.answer = pinned.copy_(self.answer, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self, ranks: int) -> tuple[list[str], list[str], float, str | None]:
        """Names of values and of engines with gradients that are not finite on some rank, the mean loss, and a signal.
        """
        if self.arrived:
            self.arrived.synchronize()
        numbers = self.answer.tolist()
        flags, loss, signals = numbers[:self.flags], numbers[self.flags], numbers[self.flags + 1:]
        wrong = [name for name, count in zip([*self.names, *self.rates], flags, strict=True) if count]
        asked = next((number.name for number, count in zip(SIGNALS, signals, strict=True) if count), None)
        return ([name for name in wrong if name in self.names], [name for name in wrong if name in self.rates],
                loss / ranks, asked)
