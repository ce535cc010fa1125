"""SIGTERM and SIGUSR1: the machine is wanted back. Training stops after its step, saves, and can be queued again."""

from __future__ import annotations

import os
import signal
import threading

import torch
import torch.distributed as dist

from gigatok_ds.parallel.topology import Topology

REQUEUE = 75  # the exit code of a run that was asked to stop and has saved: BSD's "temporary failure", try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """As a context, notes the signals instead of dying of them; any rank's counts for all.

    Ranks agree between hosts, by gloo, so that no GPU is waited for. Processes that a rank forks, data workers above all,
    ignore the first signal, which schedulers send to all of a job; a second one ends them.
    """

    def __init__(self, topology: Topology):
        self.topology, self.pid = topology, os.getpid()
        self.received = 0
        self._before: dict[int, object] = {}
        on_gpu = topology.world_size > 1 and topology.device.type == "cuda"
        self._group = dist.new_group(backend="gloo") if on_gpu else None

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.received and os.getpid() != self.pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def agreed(self) -> str | None:
        """The name of a signal that any rank has received, the same on all; collective, once a step."""
        number = self.received
        if self.topology.world_size > 1:
            box = torch.tensor(number)
            dist.all_reduce(box, dist.ReduceOp.MAX, group=self._group)
            number = int(box)
        return signal.Signals(number).name if number else None
