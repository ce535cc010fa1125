"""Copies for checkpoints: right on a CPU and, with stand-ins for CUDA's streams, in the order in which a GPU must make
them.
"""

from types import SimpleNamespace

import pytest
import torch

from gigatok_ds.engine import host_copies
from gigatok_ds.engine.host_copies import HostCopies

TENSORS = {"weights/a": torch.randn(3, 5), "exp_avg/a": torch.randn(7, dtype=torch.bfloat16), "ema/b": torch.randn(0)}
CHANGING = {"whole/used": torch.arange(9, dtype=torch.int32), "whole/one": torch.tensor(3.0)}


def test_on_a_cpu_they_are_there_at_once():
    copies, arrived = HostCopies(torch.device("cpu")).take(TENSORS, CHANGING)
    arrived()
    for name, tensor in (TENSORS | CHANGING).items():
        assert torch.equal(copies[name],
                           tensor) and (not tensor.numel() or copies[name].data_ptr() != tensor.data_ptr())


@pytest.fixture
def events(monkeypatch):
    """What happens on streams, in order, as if this were a GPU."""
    happened = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            happened.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            happened.append(f"{self.name} waits for the copies")

        def __enter__(self):
            happened.append(f"in {self.name}")

        def __exit__(self, *_):
            happened.append("back")

    class Event:
        def record(self):
            happened.append("copied")

        def synchronize(self):
            happened.append("host waits")

    copy, empty = torch.Tensor.copy_, torch.empty
    cuda = SimpleNamespace(Stream=lambda device: Stream("the side"), Event=Event, stream=lambda stream: stream,
                           current_stream=lambda device: Stream("training"))
    monkeypatch.setattr(host_copies.torch, "cuda", cuda)
    monkeypatch.setattr(host_copies.torch, "empty", lambda *shape, pin_memory=False,
                        **options: empty(*shape, **options))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, source,
                        non_blocking=False: happened.append("copy") or copy(to, source))
    return happened


def test_on_a_gpu_they_are_made_beside_training_into_the_same_memory(events):
    copies = HostCopies(torch.device("cuda", 0))
    first, arrived = copies.take(TENSORS, CHANGING)
    count = len(TENSORS) + len(CHANGING)
    assert events == ["the side waits for training", "in the side", *["copy"] * count, "copied", "back"]
    assert all(torch.equal(first[name], tensor) for name, tensor in (TENSORS | CHANGING).items())
    assert all(one.data_ptr() % 64 == 0 for one in first.values() if one.numel())
    arrived()
    assert events[-1] == "host waits"
    copies.guard()
    copies.guard()
    assert events[-2:] == ["host waits", "training waits for the copies"], "once for each snapshot"
    second, _ = copies.take(TENSORS, CHANGING)
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in first)
