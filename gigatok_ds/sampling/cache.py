"""Key/value caches of cached decoding: allocated once, owned by a sampler, never attached to the model.

Both write the new token's key and value in place. They differ in what is attended to: `DynamicKVCache` slices the past,
which spares a CPU the empty slots; `StaticKVCache` closes them, so that every step has the same shapes and addresses
and one CUDA graph, or one compiled step, serves all positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gigatok_ds.cpu.hugepages import large_empty


class DynamicKVCache:
    """Keys and values (B, heads, slots, head_dim) of one layer; slot p holds the token at position p."""

    def __init__(self, slots: int):
        self.slots, self.position = slots, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of the first len(query) rows. The first call sets rows, heads and type: under tensor parallelism a rank
        holds its own heads."""
        if self.keys is None or self.values is None:
            rows, heads, _, head_dim = key.shape
            self.keys, self.values = (large_empty((rows, heads, self.slots, head_dim), key) for _ in range(2))
        rows, end = len(query), self.position + 1
        self.keys[:rows, :, self.position] = key[:, :, 0]
        self.values[:rows, :, self.position] = value[:, :, 0]
        # One new token sees all of the past and itself, so no mask is needed.
        keys, values = self.keys[:rows, :, :end], self.values[:rows, :, :end]
        if query.device.type == "cpu" and query.dtype == torch.float32:
            # torch's fused attention is made for many queries: for one, two plain products are faster.
            scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(2, 3)
            return scores.softmax(-1) @ values
        return F.scaled_dot_product_attention(query, keys, values)


class Slots:
    """The position of the next token in an int64 tensor (1,) on the device, and which slots it may attend to: what all
    layers' FixedCaches share."""

    def __init__(self, count: int, like: Tensor):
        # Rounded up: fused attention reads its bias in pieces of 16 bytes.
        self.places = torch.arange(-(-count // 8) * 8, device=like.device)
        self.position = torch.zeros(1, dtype=torch.long, device=like.device)
        self.open, self.closed = like.new_zeros(()), like.new_full((), float("-inf"))
        self.bias = like.new_zeros(1, 1, 1, len(self.places))

    def allow(self) -> None:
        """Those up to the position, once for all layers of a step."""
        torch.where(self.places <= self.position, self.open, self.closed, out=self.bias[0, 0, 0])


class StaticKVCache:
    """The same with fixed addresses: all slots are attended to, with a bias that closes those of the future."""

    def __init__(self, slots: Slots, rows: int):
        self.slots, self.rows = slots, rows
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of the first len(query) rows. The first call, which must not be a compiled one, allocates."""
        if self.keys is None or self.values is None:
            _, heads, _, head_dim = key.shape
            shape = self.rows, heads, len(self.slots.places), head_dim
            # Zeros, for whatever is closed is still multiplied by a probability of zero.
            self.keys, self.values = (key.new_zeros(shape) for _ in range(2))
        keys, values = self.keys[: len(query)], self.values[: len(query)]
        keys.index_copy_(2, self.slots.position, key)
        values.index_copy_(2, self.slots.position, value)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=self.slots.bias)
