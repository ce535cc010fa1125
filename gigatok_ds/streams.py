"""Addressed randomness: every stream is a pure function of (seed, purpose, address).

Nothing consumes a shared generator, so neither the number of ranks nor of workers, nor resuming in the middle
of a run, changes what a step or a sample draws.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def stream_key(seed: int, purpose: str, *address: int | str) -> int:
    """A 63-bit key for the stream of `purpose` ("weights", "dropout", "crop", ...) at `address` (step, sample, ...)."""
    text = "/".join([str(seed), purpose, *map(str, address)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def numpy_stream(seed: int, purpose: str, *address: int | str) -> np.random.Generator:
    """A NumPy generator (Philox) for the stream."""
    import numpy as np

    return np.random.Generator(np.random.Philox(stream_key(seed, purpose, *address)))


def torch_stream(seed: int, purpose: str, *address: int | str, device: str = "cpu") -> torch.Generator:
    """A torch generator for the stream."""
    import torch

    return torch.Generator(device=device).manual_seed(stream_key(seed, purpose, *address))
