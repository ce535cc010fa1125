"""The memory benchmark: its arithmetic, what its meter sees, and (slow) what four ranks really hold."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from benchmark_scripts import BENCHMARKS, loaded
from torch import nn

SCRIPT = BENCHMARKS / "zero_memory.py"


@pytest.fixture(scope="module")
def benchmark():
    with loaded("zero_memory") as module:
        yield module


@pytest.mark.parametrize("stage, gigabytes", [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_theory_is_that_of_the_paper(benchmark, stage, gigabytes):
    """Figure 1 of arXiv:1910.02054: 7.5e9 parameters, 64 ranks, 12 bytes of state each; given to 0.1 GB."""
    theory = benchmark.theoretical_bytes(7_500_000_000, stage, 64, "bf16")
    assert sum(theory.values()) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_float32_needs_no_master_weights(benchmark):
    theory = benchmark.theoretical_bytes(1000, 2, 4, "fp32")
    assert list(theory.values()) == [4000, 1000, 0, 2000]


def measurement_of(benchmark, theory, **factors):
    """A measurement that agrees with the theory but for some factors; other counts in bytes."""
    held = {kind: round(value * factors.get(kind.strip(), 1)) for kind, value in theory.items()}
    measured = held | {"other": factors.get("other", 0)}
    return benchmark.Measurement(parameters=1000, device="CPU", measured=measured, peak=held)


@pytest.mark.parametrize("factors, blamed", [
    ({}, []),
    ({"parameters": 1.09, "gradients": 0.91}, []),
    ({"parameters": 1.12}, ["parameters"]),
    ({"gradients": 0.88}, ["gradients"]),
    ({"moments": 1.2}, ["optimizer state", "all of these"]),
    ({"other": 500}, ["other"]),
])
def test_what_misses_the_theory_by_more_than_a_tenth_is_named(benchmark, factors, blamed):
    theory = benchmark.theoretical_bytes(1000, 3, 4, "bf16")
    found = benchmark.failures(3, benchmark.rows(measurement_of(benchmark, theory, **factors), theory))
    assert [line.split(": ")[1] for line in found] == blamed


def test_a_superfluous_master_copy_is_named(benchmark):
    theory = benchmark.theoretical_bytes(1000, 3, 4, "fp32")
    measurement = measurement_of(benchmark, theory)
    measurement.measured[benchmark.MASTER] = 1000
    found = benchmark.failures(3, benchmark.rows(measurement, theory))
    assert [line.split(": ")[1] for line in found] == ["optimizer state", "all of these", "master weights"]


def test_the_meter_counts_every_storage_once(benchmark):
    """Plain AdamW on one matrix; its step count adds 4 bytes to the moments."""
    network = nn.Linear(64, 32, bias=False)
    adamw = torch.optim.AdamW(network.parameters())
    meter = benchmark.Meter(SimpleNamespace(network=network, _engine=SimpleNamespace(optimizer=adamw)))
    views = [network.weight.detach()[:3], network.weight.detach().T]
    for _ in range(2):
        adamw.zero_grad()
        network(torch.ones(1, 64)).sum().backward()
        meter.after_backward()
        adamw.step()
    size = 4 * 64 * 32
    assert meter.measured["parameters"] == meter.measured["gradients"] == size and len(views) == 2
    assert meter.measured[benchmark.MASTER] == 0 and meter.measured[benchmark.MOMENTS] == 2 * size + 4

    before = meter.measured["other"]
    forgotten = torch.zeros(10**6)
    meter.after_backward()
    # Tensors of other tests may have gone in between.
    assert meter.measured["other"] - before == pytest.approx(forgotten.nbytes, rel=0.1)


@pytest.mark.slow
def test_four_ranks_hold_what_zero_promises():
    """Slow: it starts 16 processes, which take minutes on few cores."""
    finished = subprocess.run([sys.executable, SCRIPT, "--ranks", "4", "--precision", "bf16"],
                              capture_output=True, text=True, timeout=900, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    ratios = [line.split() for line in finished.stdout.splitlines() if "all of these" in line]
    assert [row[0] for row in ratios] == ["0", "1", "2", "3"]
    assert all(abs(float(row[-2]) - 1) <= 0.1 for row in ratios)
