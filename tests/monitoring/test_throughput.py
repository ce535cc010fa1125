"""Speeds from a clock that the test moves, and what devices can do at most."""

import pytest
import torch

from gigatok_ds.monitoring.flops import StepFlops
from gigatok_ds.monitoring.peak_flops import peak_tflops
from gigatok_ds.monitoring.throughput import Throughput, peak_of
from gigatok_ds.parallel.topology import Topology


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def measured(peak=None, devices=1):
    clock = Clock()
    topology = Topology(rank=0, world_size=1, device=torch.device("cpu"), data_rank=0, data_size=devices)
    throughput = Throughput(topology, "images", 64, peak, clock)
    throughput.start(10)
    return throughput, clock


def batches(clock, seconds):
    while True:
        clock.now += seconds
        yield "batch"


def test_steps_are_timed_without_validations():
    throughput, clock = measured(peak=40.0)
    waiting = batches(clock, 0.5)
    for _ in range(4):
        assert throughput.next(waiting) == "batch"
        clock.now += 1.5
    with throughput.paused():
        clock.now += 1000.0
    figures = throughput.report(14, StepFlops(model=20 * 10**12, hardware=30 * 10**12))
    assert figures == pytest.approx({
        "throughput/images_per_second": 32.0, "throughput/step_seconds": 2.0, "throughput/data_wait": 0.25,
        "throughput/tflops_per_gpu": 10.0, "mfu": 0.25, "hfu": 0.375})


def test_each_report_is_of_its_own_steps():
    throughput, clock = measured()
    flops = StepFlops(model=10**12, hardware=10**12)
    with throughput.paused():
        clock.now += 50.0
    clock.now += 8.0
    assert throughput.report(18, flops)["throughput/step_seconds"] == pytest.approx(1.0)
    clock.now += 6.0
    figures = throughput.report(20, flops)
    assert figures["throughput/step_seconds"] == pytest.approx(3.0)
    assert figures["throughput/data_wait"] == 0 and not {"mfu", "hfu"} & figures.keys()


@pytest.mark.parametrize("name, precision, tf32, peak", [
    ("NVIDIA A100-SXM4-80GB", "bf16", False, 312.0),
    ("NVIDIA H100 80GB HBM3", "fp16", False, 989.4),
    ("NVIDIA H100 80GB HBM3", "fp32", True, 494.7),
    ("NVIDIA H100 PCIe", "fp32", False, 51.0),
    ("NVIDIA H200", "bf16", False, 989.4),
    ("NVIDIA H200 NVL", "bf16", False, 835.5),
    ("NVIDIA B200", "bf16", False, 2250.0),
    ("NVIDIA GB200", "bf16", False, 2500.0),
    ("NVIDIA GeForce RTX 4090", "bf16", False, 165.2),
    ("NVIDIA RTX 6000 Ada Generation", "fp32", True, 182.1),
    ("AMD Instinct MI300X", "bf16", False, 1307.4),
    ("NVIDIA GB300", "bf16", False, 2500.0),
    ("Tesla T4", "fp16", False, None),
])
def test_peaks_are_found_by_name(name, precision, tf32, peak):
    assert peak_tflops(name, precision, tf32=tf32) == peak


def test_a_cpu_has_no_known_peak():
    assert peak_of(torch.device("cpu"), "fp32") is None
