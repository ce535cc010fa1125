"""Memory layouts of maps (B, C, H, W).

On GPUs maps lie channels_last within convolutional networks: convolutions are faster so. Weights stay as they are,
since ZeRO keeps them flat; they are small beside the maps, and turned around in each convolution. CPUs gain nothing by
it, and torch's group norm is less exact there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def laid_out(x: Tensor) -> Tensor:
    """x (B, C, H, W) in the memory layout that convolutions of its device prefer."""
    return x.contiguous(memory_format=torch.contiguous_format if x.device.type == "cpu" else torch.channels_last)


def layout_of(x: Tensor) -> torch.memory_format:
    """Whether a map's channels are its innermost axis."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
