"""Attention and the transformer layers of the tokenizer.

Tensors are sequence-first, (tokens, batch, width), which is what sequence parallelism cuts along its first axis: then
a layer's inputs, position tables included, are this rank's part of the tokens.
Position tables are (tokens, 1, width); they are added to queries and keys of every attention, never to values
and never to the residual stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.models.initialisation import Fill, uniform
from gigatok_ds.parallel.layers import Layers


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(T, B, heads * head_dim) to (B, heads, T, head_dim)."""
    tokens, batch, width = x.shape
    return x.view(tokens, batch, width // head_dim, head_dim).permute(1, 2, 0, 3)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, T, head_dim) to (T, B, heads * head_dim)."""
    return x.permute(2, 0, 1, 3).flatten(2)


class MultiHeadAttention(nn.Module):
    """Multi-head attention with biases and, optionally, layer-normalised queries and keys."""

    def __init__(self, width: int, heads: int, layers: Layers, *, dropout: float = 0.0, qk_norm: bool = False):
        super().__init__()
        self.width = width
        self.head_dim = width // heads
        self.dropout = layers.attention_dropout(dropout)
        self.q_proj = layers.column(width, width, bias=True)
        self.k_proj = layers.column(width, width, bias=True)
        self.v_proj = layers.column(width, width, bias=True)
        self.out_proj = layers.row(width, width, bias=True)
        self.q_norm = layers.per_head(nn.LayerNorm(self.head_dim)) if qk_norm else nn.Identity()
        self.k_norm = layers.per_head(nn.LayerNorm(self.head_dim)) if qk_norm else nn.Identity()

    def init_fn(self, name: str) -> Fill | None:
        """Queries, keys and values are Xavier-uniform as one packed (3W, W) matrix (torch's own attention)."""
        return uniform((6 / (3 * self.width + self.width)) ** 0.5) if name[1:] == "_proj.weight" else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q = self.q_norm(split_heads(self.q_proj(query), self.head_dim))
        k = self.k_norm(split_heads(self.k_proj(key), self.head_dim))
        v = split_heads(self.v_proj(value), self.head_dim)
        drops = self.training and self.dropout.drops
        out = self._attend_dropping(q, k, v) if drops else F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(merge_heads(out))

    def _attend_dropping(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention written out, for no fused kernel draws masks of ours: it keeps (B, heads, T, T) probabilities."""
        scores = (query * self.head_dim**-0.5) @ key.transpose(-2, -1)
        return self.dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype)) @ value


class TransformerLayer(nn.Module):
    """A pre-norm layer: self-attention, then `second` attention, then an MLP.

    `second` is "cross" (queries attend to a memory that is not normalised here), "self" (a second self-attention)
    or None.
    """

    recompute_unit = "block"

    def __init__(self, width: int, heads: int, layers: Layers, *, second: str | None,
                 dropout: float = 0.0, qk_norm: bool = False):
        super().__init__()
        self.second = second
        self.self_attn = MultiHeadAttention(width, heads, layers, dropout=dropout, qk_norm=qk_norm)
        self.norm1 = layers.per_token(nn.LayerNorm(width))
        self.norm2 = layers.per_token(nn.LayerNorm(width))
        self.drop1, self.drop2 = layers.dropout(dropout), layers.dropout(dropout)
        if second:
            self.multihead_attn = MultiHeadAttention(width, heads, layers, dropout=dropout, qk_norm=qk_norm)
            self.norm3 = layers.per_token(nn.LayerNorm(width))
            self.drop3 = layers.dropout(dropout)
        self.linear1 = layers.column(width, 4 * width, bias=True)
        self.linear2 = layers.row(4 * width, width, bias=True)
        self.drop_hidden = layers.dropout(dropout, hidden=True)

    def forward(self, x: Tensor, position: Tensor | None, memory: Tensor | None = None,
                memory_position: Tensor | None = None) -> Tensor:
        x = x + self.drop1(self._attend_to_self(self.self_attn, self.norm1(x), position))
        mlp_norm = self.norm2
        if self.second == "cross":
            assert memory is not None, "cross attention needs a memory"
            query = _add(self.norm2(x), position)
            x = x + self.drop3(self.multihead_attn(query, _add(memory, memory_position), memory))
            mlp_norm = self.norm3
        elif self.second == "self":
            x = x + self.drop3(self._attend_to_self(self.multihead_attn, self.norm2(x), position))
            mlp_norm = self.norm3
        hidden = self.drop_hidden(F.gelu(self.linear1(mlp_norm(x))))
        return x + self.drop2(self.linear2(hidden))

    @staticmethod
    def _attend_to_self(attention: MultiHeadAttention, x: Tensor, position: Tensor | None) -> Tensor:
        located = _add(x, position)
        return attention(located, located, x)


def _add(x: Tensor, position: Tensor | None) -> Tensor:
    return x if position is None else x + position.to(x.dtype)
