"""GPUs by their makers' data sheets, or as someone describes another."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

from gigatok_ds.errors import InputError
from gigatok_ds.monitoring.peak_flops import PEAKS

GIB = 1024**3
GB = 10**9
CPU_PEAK = 5e10  # FLOP/s of a rank on a CPU, very roughly; calibrate
KINDS = ("half", "tf32", "fp32")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU. Bytes, and bytes per second in one direction.

    memory is what a process can have of it. `link` is to the GPUs of its host, `network` its share of the host's way to
    others, with one adapter per GPU as in the maker's reference systems. peaks: FLOP/s at most, dense, by kind of
    product: bf16 and fp16 ("half"), float32 rounded for the tensor cores ("tf32"), float32 ("fp32").
    """

    name: str
    memory: int
    memory_bandwidth: float
    link: float
    network: float
    peaks: dict[str, float]
    cuda_name: str = ""  # a part of what CUDA calls it
    is_gpu: bool = True

    def peak(self, precision: str) -> float:
        """FLOP/s at most in training.precision `precision`."""
        return self.peaks["fp32" if precision == "fp32" else "half"]


def _device(name: str, gib: float, memory_tb: float, link_gb: float, network_gb: float, cuda_name: str) -> Device:
    peaks = {kind: 1e12 * peak for kind, peak in zip(KINDS, PEAKS[cuda_name], strict=True)}
    return Device(name=name, memory=int(gib * GIB), memory_bandwidth=memory_tb * 1e12, link=link_gb * GB,
                  network=network_gb * GB, peaks=peaks, cuda_name=cuda_name)


# Data sheets: memory bandwidth; NVLink or Infinity Fabric (half of what is stated for both directions), PCIe 4 or 5 x16
# where there is neither; 200, 400 or 800 Gbit/s per GPU between hosts, 100 for workstations.
DEVICES = {device.name: device for device in (
    _device("A100-40GB", 39.4, 1.555, 300, 25, "A100"),
    _device("A100-80GB", 79.2, 2.039, 300, 25, "A100"),
    _device("H100", 79.1, 3.35, 450, 50, "H100"),
    _device("H200", 139.7, 4.8, 450, 50, "H200"),
    _device("B200", 178.3, 8.0, 900, 50, "B200"),
    _device("B300", 267.0, 8.0, 900, 100, "B300"),
    _device("GB200", 172.5, 8.0, 900, 50, "GB200"),
    _device("MI300X", 191.0, 5.3, 448, 50, "MI300X"),
    _device("L40S", 44.3, 0.864, 32, 25, "L40S"),
    _device("RTX6000-Ada", 47.3, 0.960, 32, 12.5, "RTX 6000 Ada"),
    _device("RTXPRO6000", 94.9, 1.792, 64, 12.5, "RTX PRO 6000"),
    _device("RTX4090", 23.5, 1.008, 32, 12.5, "RTX 4090"),
    _device("RTX5090", 31.3, 1.792, 64, 12.5, "RTX 5090"),
)}


def this_cpu(ranks: int) -> Device:
    """A rank's share of this machine, for runs without GPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    return Device(name="CPU", memory=memory, memory_bandwidth=1e10, link=5e9, network=1e9,
                  peaks=dict.fromkeys(KINDS, CPU_PEAK), is_gpu=False)


def device_named(name: str, memory: int) -> Device:
    """The device that CUDA calls `name` and says to have so many bytes. Raises InputError for one that is not known."""
    fitting = max((device.cuda_name for device in DEVICES.values() if device.cuda_name in name), key=len, default=None)
    like = [device for device in DEVICES.values() if device.cuda_name == fitting]
    if fitting is None:
        raise InputError(
            f"--auto does not know {name}; known are {', '.join(DEVICES)}. Choose a layout by --tp and --zero"
        )
    return min(like, key=lambda device: abs(device.memory - memory))


# What --gpu-spec takes: the unit of each figure, and what is taken where one is left out.
SPEC = {"memory_gb": None, "bandwidth_gbs": None, "bf16_tflops": None, "tf32_tflops": None, "fp32_tflops": None,
        "link_gbs": 32.0, "network_gbps": 100.0}
SPEC_HELP = ("a GPU that is not listed, by its data sheet: NAME:memory_gb=96,bandwidth_gbs=1792,bf16_tflops=503.8,"
             "tf32_tflops=251.9,fp32_tflops=126 and, if known, link_gbs=64 (10^9 bytes/s to GPUs of its host in one "
             "direction; default 32, PCIe 4) and network_gbps=100 (10^9 bits/s to other hosts). TFLOP/s are dense "
             "ones; memory and bandwidth are 10^9 bytes (/s)")


def parse_gpu_spec(text: str) -> Device:
    """NAME:figure=value,... with the figures of SPEC. Raises InputError."""
    name, _, figures = text.partition(":")
    form = f"write NAME:{','.join(f'{figure}=N' for figure in SPEC)}, the last two if known"
    if not re.fullmatch(r"[A-Za-z][\w.-]*", name) or not figures:
        raise InputError(f"--gpu-spec is {text!r}; {form}")
    if name in DEVICES or name == "CPU":
        raise InputError(f"--gpu-spec describes {name!r}, which is known already; give it another name")
    found = {figure: value for figure, value in SPEC.items() if value is not None}
    given: set[str] = set()
    for part in figures.split(","):
        figure, _, value = part.partition("=")
        if figure not in SPEC or figure in given:
            why = "given twice" if figure in given else "no figure of a GPU"
            raise InputError(f"--gpu-spec is {text!r}, but {figure!r} is {why}; {form}")
        given.add(figure)
        found[figure] = _positive(figure, value)
    if missing := [figure for figure in SPEC if figure not in found]:
        raise InputError(f"--gpu-spec is {text!r}, but {', '.join(missing)} is missing; {form}")
    return Device(name=name, memory=int(found["memory_gb"] * GB), memory_bandwidth=found["bandwidth_gbs"] * GB,
                  link=found["link_gbs"] * GB, network=found["network_gbps"] * GB / 8,
                  peaks={kind: 1e12 * found[f"{figure}_tflops"]
                         for kind, figure in zip(KINDS, ("bf16", "tf32", "fp32"), strict=True)})


def _positive(figure: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise InputError(f"--gpu-spec says {figure}={value}; it must be a number above 0")
    return number
