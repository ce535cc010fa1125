"""Faults on purpose, for tests and drills: `gigatok-ds train --inject kill:rank=2,step=7`.

Nothing of this is reached without that option: it wraps the task, whose own code knows nothing of it. Each fault
strikes once in the life of a run directory, so that a run that is started again goes on.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gigatok_ds.errors import InputError
from gigatok_ds.monitoring.history import read_history, record_event
from gigatok_ds.parallel.topology import Topology

_GRADIENTS = {"nan": math.nan, "inf": math.inf, "spike": 100.0}  # what gradients and losses are multiplied by
KINDS = {
    "kill": "SIGKILL, as of the kernel when memory is short",
    "raise": "an exception in the step",
    "hang": "the step never ends",
    "term": "SIGTERM, as of a scheduler",
    "usr1": "SIGUSR1",
    "kill-worker": "a data worker is killed",
    "hang-worker": "a data worker stops",
    "kill-saving": "SIGKILL between the files of the next checkpoint and its completion",
    "slow": "each micro batch takes a second longer, from then on and for good",
    "nan": "the loss and the gradients of an engine (part=NAME; default: the first) are NaN",
    "inf": "the gradients of an engine are infinite",
    "spike": "the loss and the gradients of an engine are 100 times what they are",
    "flip": "a bit of the last float32 weight that the rank updates of a tensor (tensor=NAME) flips",
    "drift": "a number of a tensor (tensor=NAME; default: the first buffer or parameter) of an engine changes",
}
_OF_TENSORS = ("drift", "flip")
_KEYS = ("rank", "step", "after", "steps", "part", "tensor")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Strikes `rank` in `step`, or in the first step that begins `after` so many seconds since the run was first
    started; for `steps` steps."""

    text: str
    kind: str
    rank: int = 0
    step: int | None = None
    after: float | None = None
    steps: int = 1
    part: str | None = None
    tensor: str | None = None


def parse_fault(text: str) -> Fault:
    """KIND:rank=R,step=N or KIND:rank=R,after=SECONDS, with `steps`, `part` and `tensor` where they mean something."""
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise InputError(f"--inject {text}: {kind!r} is no fault; faults are {', '.join(KINDS)}")
    values: dict = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in _KEYS:
            raise InputError(f"--inject {text}: {key!r} is not known; known are {', '.join(_KEYS)}")
        try:
            values[key] = float(value) if key == "after" else value if key in ("part", "tensor") else int(value)
        except ValueError:
            raise InputError(f"--inject {text}: {key} is {value!r}; a number is expected") from None
    if ("step" in values) == ("after" in values):
        raise InputError(f"--inject {text}: say when, by step=N or after=SECONDS")
    if "tensor" in values and kind not in _OF_TENSORS:
        raise InputError(f"--inject {text}: tensor= is for {' and '.join(_OF_TENSORS)}")
    if kind not in _GRADIENTS and ("steps" in values or ("part" in values and kind not in _OF_TENSORS)):
        raise InputError(f"--inject {text}: steps= and part= are for {', '.join(_GRADIENTS)} (part= for "
                         f"{' and '.join(_OF_TENSORS)}, too)")
    return Fault(text=text, kind=kind, **values)


def inject(task, faults: Sequence[Fault], run_dir: Path, topology: Topology):
    """The task, suffering from `faults`. Raises InputError for a rank or part that it does not have."""
    for fault in faults:
        if not 0 <= fault.rank < topology.world_size:
            raise InputError(f"--inject {fault.text}: there is no rank {fault.rank}; this job has "
                             f"{topology.world_size}")
        if fault.part is not None and fault.part not in task.engines:
            raise InputError(f"--inject {fault.text}: there is no part {fault.part}; there are "
                             f"{', '.join(task.engines)}")
    history = read_history(run_dir)
    struck = {line["fault"] for line in history if line["event"] == "injected"}
    began = next(line["time"] for line in history if line["event"] == "started")
    # All ranks look before any of them can strike.
    topology.barrier()
    ours = [fault for fault in faults
            if fault.rank == topology.rank and (fault.kind == "slow" or fault.text not in struck)]
    return _FaultyTask(task, ours, run_dir, began)


class _FaultyTask:
    """A task to the loop, with faults in its steps."""

    def __init__(self, task, faults: list[Fault], run_dir: Path, began: float):
        self._task, self._faults, self._run_dir = task, faults, run_dir
        self._began = began
        self._first: dict[Fault, int] = {}  # the step in which each first struck

    def __getattr__(self, name: str):
        return getattr(self._task, name)

    def train_micro_batch(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        with ExitStack() as stack:
            factor = 1.0
            for fault in self._due(step):
                engine = self._task.engines[fault.part or next(iter(self._task.engines))]
                if fault.kind in _GRADIENTS:
                    for handle in _scaled_gradients(engine.network, _GRADIENTS[fault.kind]):
                        stack.callback(handle.remove)
                    of_loss = fault.kind != "inf" and fault.part in (None, next(iter(self._task.engines)))
                    factor *= _GRADIENTS[fault.kind] if of_loss else 1.0
                else:
                    _ACTIONS[fault.kind](fault, engine)
            logged = self._task.train_micro_batch(batch, step)
        return logged if factor == 1.0 else {**logged, "loss": logged["loss"] * factor}

    def _due(self, step: int) -> list[Fault]:
        due = []
        for fault in self._faults:
            now = step == fault.step if fault.after is None else time.time() - self._began >= fault.after
            if fault.kind == "slow":
                due += [fault] * (now or (fault.step is not None and step > fault.step))
            elif now and fault not in self._first:
                self._first[fault] = step
                record_event(self._run_dir, "injected", fault=fault.text, step=step, rank=fault.rank)
                due.append(fault)
            elif fault.kind in _GRADIENTS and fault in self._first and step < self._first[fault] + fault.steps:
                due.append(fault)
        return due


def _scaled_gradients(network: nn.Module, factor: float) -> list:
    return [parameter.register_hook(lambda gradient: gradient * factor)
            for parameter in network.parameters() if parameter.requires_grad]


def _raise(fault: Fault, _) -> None:
    raise RuntimeError(f"injected: {fault.text}")


def _hang(*_) -> None:
    while True:
        time.sleep(3600)


def _to_worker(number: int, fault: Fault, _) -> None:
    workers = multiprocessing.active_children()
    if not workers:
        raise InputError(f"--inject {fault.text}: there is no data worker; set data.workers above 0")
    pid = workers[0].pid
    assert pid is not None  # it has been started
    os.kill(pid, number)


def _kill_saving(_, engine) -> None:
    """The next snapshot that is written ends this process when its files are there, and their list is not."""
    snapshot = engine.snapshot

    def doomed():
        taken = snapshot()

        @functools.wraps(taken.write)
        def write(folder: Path):
            type(taken).write(taken, folder)
            os.kill(os.getpid(), signal.SIGKILL)

        taken.write = write
        return taken

    engine.snapshot = doomed


@torch.no_grad()
def _drift(fault: Fault, engine) -> None:
    tensors = {**dict(engine.network.named_buffers()), **dict(engine.network.named_parameters())}
    if fault.tensor is not None and fault.tensor not in tensors:
        raise InputError(f"--inject {fault.text}: there is no tensor {fault.tensor}")
    tensor = tensors[fault.tensor] if fault.tensor else next(value for value in tensors.values() if value.numel())
    tensor.view(-1)[-1] += 1


@torch.no_grad()
def _flip(fault: Fault, engine) -> None:
    """A bit of the exponent, so that the weight is 16 times what it was, or a sixteenth."""
    held = engine.weights()
    name = fault.tensor or next(iter(held), "")
    if name not in held:
        raise InputError(f"--inject {fault.text}: this rank updates nothing of a tensor {name}")
    held[name].values.view(torch.int32)[-1] ^= 1 << 25


_ACTIONS: dict[str, Callable] = {
    "kill": lambda *_: os.kill(os.getpid(), signal.SIGKILL),
    "raise": _raise,
    "hang": _hang,
    "term": lambda *_: os.kill(os.getpid(), signal.SIGTERM),
    "usr1": lambda *_: os.kill(os.getpid(), signal.SIGUSR1),
    "kill-worker": functools.partial(_to_worker, signal.SIGKILL),
    "hang-worker": functools.partial(_to_worker, signal.SIGSTOP),
    "kill-saving": _kill_saving,
    "slow": lambda *_: time.sleep(1.0),
    "flip": _flip,
    "drift": _drift,
}
