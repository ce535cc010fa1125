"""The class-conditional GPT over codes (LlamaGen's decoder with learned absolute positions)."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.config.model import GPTConfig
from gigatok_ds.errors import InputError
from gigatok_ds.models.attention import merge_heads, split_heads
from gigatok_ds.models.initialisation import Fill, constant, normal
from gigatok_ds.parallel.layers import PLAIN, Layers


class KeyValueCache(Protocol):
    """Keys and values of one layer's past, which knows the position of the token that comes next."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep one new token's key and value, and attend to it and to its past; all (B, heads, 1, head_dim)."""


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, times the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class CausalAttention(nn.Module):
    """Causal self-attention without biases; q, k and v are one packed projection."""

    def __init__(self, config: GPTConfig, layers: Layers):
        super().__init__()
        width = config.transformer.width
        self.head_dim = width // config.transformer.heads
        self.wqkv = layers.column(width, 3 * width, bias=False, groups=3)
        self.wo = layers.row(width, width, bias=False)
        self.q_norm = layers.per_head(nn.LayerNorm(self.head_dim)) if config.qk_norm else nn.Identity()
        self.k_norm = layers.per_head(nn.LayerNorm(self.head_dim)) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        q, k, v = (split_heads(part, self.head_dim) for part in self.wqkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = cache.attend(q, k, v)
        return self.wo(merge_heads(out))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: GPTConfig, layers: Layers):
        super().__init__()
        width, hidden = config.transformer.width, config.ffn_width
        self.w1 = layers.column(width, hidden, bias=False)
        self.w3 = layers.column(width, hidden, bias=False)
        self.w2 = layers.row(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    recompute_unit = "block"

    def __init__(self, config: GPTConfig, layers: Layers):
        super().__init__()
        self.attention_norm = layers.per_token(RMSNorm(config.transformer.width, config.norm_eps))
        self.attention = CausalAttention(config, layers)
        self.ffn_norm = layers.per_token(RMSNorm(config.transformer.width, config.norm_eps))
        self.feed_forward = FeedForward(config, layers)
        self.attention_dropout = layers.dropout(config.residual_dropout)
        self.ffn_dropout = layers.dropout(config.residual_dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), cache))
        return x + self.ffn_dropout(self.feed_forward(self.ffn_norm(x)))


class ClassEmbedding(nn.Module):
    """A table of num_classes + 1 rows; the last row stands for "no class" (classifier-free guidance)."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, classes: Tensor) -> Tensor:
        return self.embedding_table(classes)


class GPT(nn.Module):
    """Class, then codes: position 0 holds the class, position i the i-th code; each predicts the next code."""

    def __init__(self, config: GPTConfig, layers: Layers = PLAIN):
        super().__init__()
        self.config = config
        width = config.transformer.width
        self.cls_embedding = ClassEmbedding(config.num_classes, width)
        self.tok_embeddings = layers.vocab_embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.sequence_length + 1, width))
        self.cut, self.whole_vocabulary, self.cross_entropy = layers.tokens, layers.whole_features, layers.cross_entropy
        self.token_dropout = layers.dropout(config.token_dropout)
        self.layers = nn.ModuleList(Block(config, layers) for _ in range(config.transformer.layers))
        self.norm = layers.per_token(RMSNorm(width, config.norm_eps))
        self.output = layers.column(width, config.vocab_size, bias=False)

    def initial_fill(self, name: str) -> Fill | None:
        """N(0, 0.02) for weights, N(0, 1/width) for positions, and a zero head: the first loss is ln(vocab)."""
        if name == "positional_embedding":
            return normal(self.config.transformer.width**-0.5)
        if name == "output.weight":
            return constant(0.0)
        owner = self.get_submodule(name.rpartition(".")[0])
        return normal(0.02) if name.endswith("weight") and "Norm" not in type(owner).__name__ else None

    @property
    def unconditional_class(self) -> int:
        return self.config.num_classes

    def check_classes(self, classes: Tensor) -> None:
        """InputError unless every class is in [0, num_classes]; num_classes itself means "no class"."""
        if classes.numel() and (int(classes.min()) < 0 or int(classes.max()) > self.unconditional_class):
            raise InputError(
                f"classes must be in [0, {self.config.num_classes}); got {int(classes.min())} to {int(classes.max())}"
            )

    def forward(self, codes: Tensor, classes: Tensor, targets: Tensor | None = None) -> Tensor:
        """Teacher forcing: codes (B, t) and classes (B,) to float32 logits (B, t + 1, vocab).

        Feed all codes but the last to predict every code. With targets (B, t + 1) the result is the cross-entropy of
        each, float32 (B, t + 1), in nats.
        """
        logits = self.output(self.norm(self._blocks(codes, classes)))
        if targets is not None:
            return self.cross_entropy(logits, targets.t()).t()
        return self.whole_vocabulary(logits).transpose(0, 1).float()

    def hidden_states(self, codes: Tensor, classes: Tensor, *, depth: int | None = None) -> Tensor:
        """The residual stream (t + 1, B, width) after block `depth` (counted from 1; None: after the last)."""
        return self.cut.gather(self._blocks(codes, classes, depth))

    def _blocks(self, codes: Tensor, classes: Tensor, depth: int | None = None) -> Tensor:
        """`hidden_states`, of this rank's tokens."""
        tokens = torch.cat([self.cls_embedding(classes)[:, None], self.tok_embeddings(codes)], dim=1)
        x = tokens.transpose(0, 1)
        x = self.token_dropout(self.cut.scatter(x + self.positional_embedding[: x.shape[0], None].to(x.dtype)))
        for block in self.layers[:depth]:
            x = block(x)
        return x

    def decode_step(self, tokens: Tensor, position: int | Tensor, caches: list[KeyValueCache]) -> Tensor:
        """One cached step: logits (B, vocab) float32 of the code after `position`.

        tokens (B,) are classes at position 0 and the codes generated last at every later position. A position after
        the first may be an int64 tensor () on the device, so that one compiled step serves them all.
        """
        embedding = self.tok_embeddings if isinstance(position, Tensor) or position else self.cls_embedding
        x = embedding(tokens)[None]
        x = x + self.positional_embedding[position].to(x.dtype)
        for block, cache in zip(self.layers, caches):
            x = block(x, cache)
        return self.whole_vocabulary(self.output(self.norm(x)))[0].float()
