"""How long a step takes: what is computed, what is sent over which link, and what of it hides behind what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gigatok_ds.planning.cluster import Cluster
from gigatok_ds.planning.rehearsed import MicroBatch


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What no data sheet says. `measured` scales step times by what calibration runs took: 1 without any."""

    compute: float = 0.40  # of a GPU's peak, in matrix products and convolutions
    kernel_seconds: float = 7e-6  # to start a kernel; a GPU waits where its kernels are shorter
    links: float = 0.70  # of a link's bandwidth
    overlap: float = 0.70  # of the data ranks' traffic that is hidden behind the backward pass
    memory: float = 0.94  # of a GPU's memory, since the allocator leaves gaps
    reserved: float = 1.5e9  # bytes of CUDA's context and NCCL's buffers
    measured: float = 1.0

    def lines(self) -> list[str]:
        return [
            f"matrix products and convolutions run at {self.compute:.0%} of the GPU's dense peak",
            f"a kernel takes at least {self.kernel_seconds * 1e6:g} microseconds to start",
            f"links give {self.links:.0%} of their bandwidth, collectives are rings",
            f"{self.overlap:.0%} of the traffic between data ranks hides behind the backward pass",
            f"{self.memory:.0%} of the GPU's memory less {self.reserved / 1e9:g} GB can be filled",
            "data is never waited for; validation and checkpoints are not counted",
            *([f"step times are multiplied by {self.measured:.3f}, as measured by --calibrate"] if self.measured != 1 else []),
        ]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a GPU sends in a step: to its tensor group, and to its data group within and beyond its host.

    Between hosts it is this GPU's share of what its host's adapters send.
    """

    tensor: float
    data_inside: float
    data_between: float


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, and what they are made of."""

    computing: float
    tensor_traffic: float
    update: float
    exposed_data_traffic: float
    launch_bound: bool
    factor: float = 1.0

    @property
    def seconds(self) -> float:
        return self.factor * (self.computing + self.tensor_traffic + self.update + self.exposed_data_traffic)


def traffic_of(micro: MicroBatch, *, cluster: Cluster, tensor: int, accumulation: int, zero: Mapping, half: bool,
               elements: int) -> Traffic:
    """Data ranks: at ZeRO 0 and 1 gradients are summed once a step, at 2 and 3 after every micro batch; updated parameters are
    gathered once, or at 3 in every forward and backward pass (Rajbhandari et al. 2020, arXiv:1910.02054, section 7)."""
    data, stage = cluster.ranks // tensor, zero["stage"]
    whole = elements * (2 if half else 4)
    sums = 1 if stage <= 1 else accumulation
    gathers = 1 if stage <= 2 else 2 * accumulation
    sent = (data - 1) / data * whole * (sums + gathers)
    in_host = cluster.per_host // tensor  # of a data group
    if cluster.hosts == 1:
        return Traffic(tensor=accumulation * micro.sent, data_inside=sent, data_between=0.0)
    return Traffic(tensor=accumulation * micro.sent, data_inside=sent if in_host > 1 else 0.0, data_between=sent / in_host)


def step_time(micro: MicroBatch, traffic: Traffic, *, cluster: Cluster, accumulation: int, precision: str, own_elements: float,
              assumptions: Assumptions) -> StepTime:
    """own_elements: parameters that this rank's optimizer updates."""
    device = cluster.device
    computed = micro.flops / (device.peak(precision) * assumptions.compute)
    started = micro.kernels * assumptions.kernel_seconds
    data_seconds = max(traffic.data_inside / (device.link * assumptions.links),
                       traffic.data_between / (device.network * assumptions.links))
    return StepTime(
        computing=accumulation * max(computed, started),
        tensor_traffic=traffic.tensor / (device.link * assumptions.links),
        update=28 * own_elements / device.memory_bandwidth,  # reads and writes of float32 weights, moments and gradients
        exposed_data_traffic=(1 - assumptions.overlap) * data_seconds,
        launch_bound=started > computed,
        factor=assumptions.measured,
    )
