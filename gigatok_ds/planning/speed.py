"""How long a step takes: what is computed, what is sent over which link, and what of it hides behind what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gigatok_ds.dry_run.dry_run_result import NO_MATRICES, MicroBatch, MuonWork
from gigatok_ds.dry_run.update_bytes import bucket_bytes, muon_bytes, update_bytes
from gigatok_ds.dry_run.work import Rates
from gigatok_ds.planning.cluster import Cluster, Device


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What no data sheet says. `measured` scales step times by what calibration runs took: 1 without any."""

    compute: float = 0.70  # of a GPU's peak, in matrix products, convolutions and attention
    bandwidth: float = 0.85  # of its memory's
    kernel_seconds: float = 4e-6  # to start a kernel; a GPU waits where its kernels are shorter
    links: float = 0.70  # of a link's bandwidth
    overlap: float = 0.70  # of the data ranks' traffic that is hidden behind the backward pass
    memory: float = 0.94  # of a GPU's memory, since the allocator leaves gaps
    reserved: float = 1.5e9  # bytes of CUDA's context and NCCL's buffers
    measured: float = 1.0

    def lines(self) -> list[str]:
        return [
            f"matrix products, convolutions and attention run at {self.compute:.0%} of the GPU's dense peak",
            f"kernels move their bytes at {self.bandwidth:.0%} of its memory's bandwidth",
            f"a kernel takes at least {self.kernel_seconds * 1e6:g} microseconds to start, and longest of the three",
            f"links give {self.links:.0%} of their bandwidth, collectives are rings",
            f"{self.overlap:.0%} of the traffic between data ranks hides behind the backward pass",
            f"{self.memory:.0%} of the GPU's memory less {self.reserved / 1e9:g} GB can be filled",
            "data is never waited for; validation and checkpoints are not counted",
            *([f"step times are multiplied by {self.measured:.3f}, as measured by --calibrate"] if self.measured != 1
              else []),
        ]

    def rates(self, device: Device) -> Rates:
        return Rates(products={kind: self.compute * peak for kind, peak in device.peaks.items()},
                     bandwidth=self.bandwidth * device.memory_bandwidth,
                     launch=self.kernel_seconds if device.is_gpu else 0.0)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a GPU sends in a step: to its tensor group, to its data group within and beyond its host, to all.

    Between hosts it is this GPU's share of what its host's adapters send.
    """

    tensor: float
    data_inside: float
    data_between: float
    matrices: float = 0.0  # of Muon, to all ranks

    @property
    def total(self) -> float:
        return self.tensor + self.data_inside + self.data_between + self.matrices


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, and what they are made of. starting: of those of computing, what kernels that are
    shorter than it takes to start them wait for."""

    computing: float
    starting: float
    tensor_traffic: float
    update: float
    exposed_data_traffic: float
    factor: float = 1.0

    @property
    def seconds(self) -> float:
        return self.factor * (self.computing + self.tensor_traffic + self.update + self.exposed_data_traffic)

    @property
    def launch_bound(self) -> bool:
        """Whether larger micro batches would be noticeably faster."""
        return self.starting > 0.03 * self.computing


def traffic_of(micro: MicroBatch, *, cluster: Cluster, tensor: int, accumulation: int, zero: Mapping, half: bool,
               elements: int) -> Traffic:
    """Data ranks: at ZeRO 0 and 1 gradients are summed once a step, at 2 and 3 after every micro batch; updated
    parameters are gathered once, or at 3 in every forward and backward pass (Rajbhandari et al. 2020, arXiv:1910.02054,
    section 7)."""
    data, stage = cluster.ranks // tensor, zero["stage"]
    full = elements * (2 if half else 4)
    sums = 1 if stage <= 1 else accumulation
    gathers = 1 if stage <= 2 else 2 * accumulation
    sent = (data - 1) / data * full * (sums + gathers)
    in_host = cluster.per_host // tensor  # of a data group
    if cluster.hosts == 1:
        return Traffic(tensor=accumulation * micro.sent, data_inside=sent, data_between=0.0)
    return Traffic(tensor=accumulation * micro.sent, data_inside=sent if in_host > 1 else 0.0,
                   data_between=sent / in_host)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What the optimizer does in a step: of the `elements` parameters that a tensor rank trains it updates
    `own_elements`, in ZeRO stage `stage`, and keeps an average of them if `average`. `muon` are its matrices.
    """

    precision: str
    stage: int
    elements: float
    own_elements: float
    average: bool
    muon: MuonWork = NO_MATRICES


def step_time(micro: MicroBatch, traffic: Traffic, update: Update, *, cluster: Cluster, accumulation: int,
              assumptions: Assumptions) -> StepTime:
    """The seconds of a step of `accumulation` micro batches."""
    device, how = cluster.device, {"half": update.precision != "fp32", "partitioned": update.stage > 0}
    rates = assumptions.rates(device)
    data_seconds = max(traffic.data_inside / (device.link * assumptions.links),
                       traffic.data_between / (device.network * assumptions.links))
    moved = (update.own_elements * sum(update_bytes(**how, average=update.average).values())
             + accumulation * update.elements * bucket_bytes(**how))
    orthogonalizing, exchanging = _muon_seconds(update, traffic, cluster, assumptions)
    return StepTime(
        computing=accumulation * micro.work.seconds(rates),
        starting=accumulation * micro.work.starting(rates),
        tensor_traffic=traffic.tensor / (device.link * assumptions.links) + exchanging,
        update=moved / rates.bandwidth + orthogonalizing,
        exposed_data_traffic=(1 - assumptions.overlap) * data_seconds,
        factor=assumptions.measured,
    )


def _muon_seconds(update: Update, traffic: Traffic, cluster: Cluster, assumptions: Assumptions) -> tuple[float, float]:
    """Of computing with Muon's matrices, beyond what Adam would have done, and of sending them, which nothing hides."""
    if not update.muon.matrices:
        return 0.0, 0.0
    device, half = cluster.device, update.precision != "fp32"
    rates, own = assumptions.rates(device), update.own_elements * update.muon.elements / update.elements
    adam = update_bytes(half=half, partitioned=update.stage > 0, average=False)["Adam"]
    moved = own * (sum(muon_bytes(half=half).values()) - adam)
    computing = update.muon.flops(cluster.ranks) / rates.products["half" if half else "fp32"]
    beyond = traffic.matrices * (cluster.hosts - 1) / cluster.hosts
    sending = max((traffic.matrices - beyond) / device.link, beyond / device.network if beyond else 0.0)
    return moved / rates.bandwidth + computing, sending / assumptions.links
