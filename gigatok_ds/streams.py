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


class SampleDraws:
    """Uniform numbers in [0, 1) for the samples of a global batch, of which this rank holds some.

    Every rank draws for the whole batch and keeps its own, so that a sample gets the same numbers on every layout.
    """

    def __init__(self, generator: torch.Generator, batch_size: int, rows: torch.Tensor):
        """rows: int64 (B,), the places in the global batch of the samples that this rank holds."""
        self.generator, self.batch_size, self.rows = generator, batch_size, rows

    def per_sample(self, count: int) -> torch.Tensor:
        """The next `count` numbers of each sample, float32 (count, B) on the CPU."""
        import torch

        return torch.rand((count, self.batch_size), generator=self.generator)[:, self.rows]

    def shared(self, count: int) -> list[float]:
        """The next `count` numbers, the same for all samples of the global batch."""
        import torch

        return torch.rand(count, generator=self.generator).tolist()
