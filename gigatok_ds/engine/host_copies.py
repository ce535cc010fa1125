"""Copies of training's state in host memory, for checkpoints. On a GPU they are made beside training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_ALIGNED = 64  # bytes


class HostCopies:
    """Makes copies of a network's state, the same tensors every time.

    From a GPU they go into one piece of pinned memory, which each call uses again, on a stream of their own: neither
    the host nor training waits for them, and `guard` keeps training from changing what has not been copied yet.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._done: torch.cuda.Event | None = None

    def take(self, tensors: Mapping[str, Tensor],
             changing: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Copies of both, and what waits until they are there. `changing` is what forward passes change, too: small
        buffers.
        """
        if self._stream is None:
            return {name: _copy(tensor) for name, tensor in [*tensors.items(), *changing.items()]}, _nothing
        sources = {**tensors, **{name: tensor.detach().clone() for name, tensor in changing.items()}}
        copies = self._places(sources)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream), torch.no_grad():
            for name, source in sources.items():
                copies[name].copy_(source, non_blocking=True)
                if source.is_cuda:  # its memory must not be used again before
                    source.record_stream(self._stream)
            self._done = torch.cuda.Event()
            self._done.record()
        return copies, self._done.synchronize

    def guard(self) -> None:
        """Before what was copied is changed: on the device the change waits until it has been."""
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)
            self._done = None

    def _places(self, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where each goes in the pinned memory, which is made anew when it is too small."""
        starts, size = {}, 0
        for name, source in sources.items():
            starts[name] = size
            size += -(-source.nbytes // _ALIGNED) * _ALIGNED
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return {name: self._memory[start:start
                                   + sources[name].nbytes].view(sources[name].dtype).view(sources[name].shape)
                for name, start in starts.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _nothing() -> None:
    """Copies that were waited for."""
