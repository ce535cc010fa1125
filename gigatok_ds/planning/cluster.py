"""The machines of a plan: how much their GPUs hold, compute and send."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from gigatok_ds.errors import InputError
from gigatok_ds.training.device_peaks import peak_tflops

GIB = 1024**3
GB = 10**9
CPU_PEAK = 5e10  # FLOP/s of a rank on a CPU, very roughly; calibrate


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU, by its maker's data sheet. Bytes, and bytes per second in one direction.

    memory is what a process can have of it. `link` is to the GPUs of its host, `network` its share of the host's way to others,
    with one adapter per GPU as in the maker's reference systems.
    """

    name: str
    memory: int
    memory_bandwidth: float
    link: float
    network: float
    peak_name: str | None  # as training.device_peaks.PEAKS knows it; None: a CPU

    def peak(self, precision: str) -> float:
        """FLOP/s at most, dense, in training.precision `precision`."""
        return CPU_PEAK if self.peak_name is None else 1e12 * peak_tflops(self.peak_name, precision, tf32=False)


def _device(name: str, gib: float, memory_tb: float, link_gb: float, network_gb: float, peak_name: str) -> Device:
    return Device(name=name, memory=int(gib * GIB), memory_bandwidth=memory_tb * 1e12, link=link_gb * GB,
                  network=network_gb * GB, peak_name=peak_name)


# NVIDIA's data sheets: memory bandwidth; NVLink (half of what is stated for both directions); 200 or 400 Gbit/s per GPU.
DEVICES = {device.name: device for device in (
    _device("A100-40GB", 39.4, 1.555, 300, 25, "A100"),
    _device("A100-80GB", 79.2, 2.039, 300, 25, "A100"),
    _device("H100", 79.1, 3.35, 450, 50, "H100"),
    _device("H200", 139.7, 4.8, 450, 50, "H200"),
    _device("B200", 178.3, 8.0, 900, 50, "B200"),
)}


def this_cpu(ranks: int) -> Device:
    """A rank's share of this machine, for runs without GPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    return Device(name="CPU", memory=memory, memory_bandwidth=1e10, link=5e9, network=1e9, peak_name=None)


def device_named(name: str, memory: int) -> Device:
    """The device that CUDA calls `name` and says to have so many bytes. Raises InputError for one that is not known."""
    like = [device for device in DEVICES.values() if device.peak_name in name]
    if not like:
        raise InputError(f"--auto does not know {name}; known are {', '.join(DEVICES)}. Choose a layout by --tp and --zero")
    return min(like, key=lambda device: abs(device.memory - memory))


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`hosts` hosts of `per_host` GPUs each."""

    hosts: int
    per_host: int
    device: Device

    @property
    def ranks(self) -> int:
        return self.hosts * self.per_host

    def __str__(self) -> str:
        return f"{self.hosts}x{self.per_host}x{self.device.name}"


_FORM = re.compile(r"(?:(\d+)x)?(\d+)x([A-Za-z].*)")


def parse_cluster(text: str, *, memory_gb: float | None = None, network_gbps: float | None = None) -> Cluster:
    """HOSTSxGPUSxDEVICE, such as 8x8xH100, or GPUSxDEVICE of a single host.

    memory_gb (10^9 bytes) and network_gbps (10^9 bits per second and GPU) replace what the data sheet says. Raises InputError.
    """
    match = _FORM.fullmatch(text.strip())
    if not match:
        raise InputError(f"--cluster is {text!r}; write HOSTSxGPUSxDEVICE, such as 8x8xH100, with one of {', '.join(DEVICES)}")
    hosts, per_host, name = int(match[1] or 1), int(match[2]), match[3]
    known = DEVICES | {"CPU": this_cpu(per_host or 1)}
    if name not in known:
        raise InputError(f"--cluster is {text!r}, but {name!r} is not known; known are {', '.join(known)}")
    if not (hosts and per_host):
        raise InputError(f"--cluster is {text!r}; it needs at least one host and one GPU")
    device = known[name]
    for what, value in (("--memory-gb", memory_gb), ("--network-gbps", network_gbps)):
        if value is not None and not value > 0:
            raise InputError(f"{what} is {value}; it must be above 0")
    if memory_gb is not None:
        device = replace(device, memory=int(memory_gb * GB))
    if network_gbps is not None:
        device = replace(device, network=network_gbps * GB / 8)
    return Cluster(hosts=hosts, per_host=per_host, device=device)
