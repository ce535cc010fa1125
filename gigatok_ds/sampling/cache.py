"""Key/value caches of cached decoding: allocated once, owned by a sampler, never attached to the model.

Both write the new token's key and value in place. They differ in what is attended to: `PrefixCache` slices the past,
which spares a CPU the empty slots; `FixedCache` masks them, so that every step has the same shapes and addresses and
one compiled step (on a GPU: one CUDA graph) serves all positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gigatok_ds.sampling.large_pages import large_empty


class PrefixCache:
    """Keys and values (B, heads, slots, head_dim) of one layer; slot p holds the token at position p."""

    def __init__(self, slots: int):
        self.slots, self.position = slots, 0
        self.keys = self.values = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of the first len(query) rows. The first call sets rows, heads and type: under tensor parallelism a rank
        holds its own heads."""
        if self.keys is None:
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


class FixedCache:
    """The same with the position in an int64 tensor (1,) on the device, which all layers share."""

    def __init__(self, slots: int, position: Tensor):
        self.position = position
        self.places = torch.arange(slots, device=position.device)
        self.keys = self.values = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of the first len(query) rows. The first call, which must not be a compiled one, allocates."""
        if self.keys is None:
            rows, heads, _, head_dim = key.shape
            # Zeros, for whatever is masked is still multiplied by a probability of zero.
            self.keys, self.values = (key.new_zeros(rows, heads, len(self.places), head_dim) for _ in range(2))
            if key.is_cuda:
                # A CUDA graph may then write to them where they lie instead of copying them in.
                torch._dynamo.mark_static_address(self.keys)
                torch._dynamo.mark_static_address(self.values)
        keys, values = self.keys[: len(query)], self.values[: len(query)]
        keys.index_copy_(2, self.position, key)
        values.index_copy_(2, self.position, value)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=(self.places <= self.position)[None])
