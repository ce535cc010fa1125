"""The key/value cache of cached decoding: preallocated, owned by one generation, never attached to the model."""

from __future__ import annotations

import torch
from torch import Tensor

from gigatok_ds.models.gpt import GPT


class LayerCache:
    """Keys and values (B, heads, max_length, head_dim) of one layer, filled from the left."""

    def __init__(self, batch: int, heads: int, max_length: int, head_dim: int, *, device, dtype):
        self.keys = torch.empty(batch, heads, max_length, head_dim, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, heads, t, head_dim) and return all keys and values so far."""
        end = self.length + key.shape[2]
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def make_caches(gpt: GPT, batch: int) -> list[LayerCache]:
    """One empty cache per layer, for the class and a whole sequence of codes."""
    size, weight = gpt.config.transformer, gpt.norm.weight
    return [
        LayerCache(batch, size.heads, gpt.config.sequence_length + 1, size.width // size.heads,
                   device=weight.device, dtype=weight.dtype)
        for _ in gpt.layers
    ]
