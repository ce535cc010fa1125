"""A setting of CUDA's driver, which reads it once, when a process first asks it for anything."""

from __future__ import annotations

import os


def order_kernels(tensor_size: int) -> None:
    """Megatron overlaps communication with computation relying on the order of kernels in one queue. A user's setting
    stays.
    """
    if tensor_size > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
