"""A setting of CUDA's driver, which reads it before there is any context: nothing here may import torch."""

from __future__ import annotations

import os


def order_kernels(tensor_size: int) -> None:
    """Megatron overlaps communication with computation relying on the order of kernels in one queue. A user's setting stays."""
    if tensor_size > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
