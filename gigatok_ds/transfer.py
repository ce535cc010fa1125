"""Small tensors on their way from the host to a device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. A GPU fetches it when it gets there, from pinned memory: of what may be paged out, the
    driver first makes a copy of its own, for which the host waits until all work before it is done."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
