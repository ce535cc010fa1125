"""How fast a run is, how long it waits for data, and how much of the device it uses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from gigatok_ds.monitoring.flops import StepFlops
from gigatok_ds.monitoring.peak_flops import peak_tflops
from gigatok_ds.parallel.topology import Topology

Batch = TypeVar("Batch")


def peak_of(device: torch.device, precision: str) -> float | None:
    """`peak_tflops` of this device as torch is set up; None on a CPU."""
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_tflops(torch.cuda.get_device_name(device), precision, tf32=tf32)


class Throughput:
    """Measures training steps from one report to the next; what happens within `paused` is left out.

    A report has to follow a wait for the device, as every logging step has, or steps still running would count as done.
    """

    def __init__(self, topology: Topology, unit: str, batch_size: int, peak: float | None,
                 clock: Callable[[], float] = time.perf_counter):
        """unit: what a global batch holds `batch_size` of; peak: TFLOP/s of a device."""
        self.topology, self.unit, self.batch_size, self.peak, self.clock = topology, unit, batch_size, peak, clock
        self._last_step: int | None = None
        self._restart()

    def _restart(self) -> None:
        self._started, self._waited, self._paused = self.clock(), 0.0, 0.0

    def start(self, step: int) -> None:
        """Steps after `step` are measured from now on."""
        self._last_step = step
        self._restart()

    def next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, for which this rank may have to wait."""
        before = self.clock()
        batch = next(batches)
        self._waited += self.clock() - before
        return batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, time does not count: validations, checkpoints."""
        if self.topology.device.type == "cuda":
            torch.cuda.synchronize(self.topology.device)  # training's own kernels still count
        before = self.clock()
        yield
        self._paused += self.clock() - before

    def report(self, step: int, flops: StepFlops) -> dict[str, float]:
        """Figures of the steps since the last report, with what one step takes; collective.

        data_wait is the fraction of time for which the rank that waits most has waited for data. tflops_per_gpu is of
        the trained networks, as is mfu, the fraction of the peak; hfu also counts frozen networks and what is computed
        again.
        """
        assert self._last_step is not None and step > self._last_step, "start, then report later steps"
        elapsed, waited = self.clock() - self._started - self._paused, self._waited
        seconds = elapsed / (step - self._last_step)
        self.start(step)
        done, computed = (count / seconds / self.topology.world_size / 1e12 for count in flops)
        figures = {
            f"throughput/{self.unit}_per_second": self.batch_size / seconds,
            "throughput/step_seconds": seconds,
            "throughput/data_wait": self.topology.max_over_ranks(waited / elapsed),
            "throughput/tflops_per_gpu": done,
        }
        return figures if self.peak is None else figures | {"mfu": done / self.peak, "hfu": computed / self.peak}
