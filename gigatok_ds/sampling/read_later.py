"""Results of a GPU are read while it computes the next ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Label = TypeVar("Label")


def read_later(results: Iterable[tuple[Label, Tensor]]) -> Iterator[tuple[Label, Tensor]]:
    """The labels and tensors in their order, on the CPU; each comes once the next one has been started.

    A tensor on a GPU is copied to pinned memory behind what computes it, so that nobody waits for an idle GPU.
    """
    waiting = None
    try:
        for label, tensor in results:
            started = label, *_started(tensor)
            if waiting is not None:
                yield _arrived(*waiting)
            waiting = started
    except Exception:
        if waiting is not None:  # it was there before what has gone wrong
            yield _arrived(*waiting)
        raise
    if waiting is not None:
        yield _arrived(*waiting)


def _started(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if not tensor.is_cuda:
        return tensor, None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return copy, event


def _arrived(label: Label, copy: Tensor, event: torch.cuda.Event | None) -> tuple[Label, Tensor]:
    if event is not None:
        event.synchronize()
    return label, copy
