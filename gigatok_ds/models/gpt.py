"""The class-conditional GPT over codes (LlamaGen's decoder, Sun et al. 2024, arXiv:2406.06525)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.config.model import GPTConfig
from gigatok_ds.errors import InputError
from gigatok_ds.models.adaln import adaptive_projection, modulate, project
from gigatok_ds.models.attention import merge_heads, split_heads
from gigatok_ds.models.initialisation import Fill, constant, normal
from gigatok_ds.models.rotary import rotary_table, rotate
from gigatok_ds.parallel.dropout import DropPath
from gigatok_ds.parallel.layers import PLAIN, Layers

# Of each block, and at last of the final norm; see models.adaln.
Modulations = list[Tensor | None]


class KeyValueCache(Protocol):
    """Keys and values of one layer's past, which knows the position of the token that comes next."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep one new token's key and value, and attend to it and to its past; all (B, heads, 1, head_dim)."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight in x's type, computed in float32 at least: on a GPU by one of torch's kernels."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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

    def forward(self, x: Tensor, rotation: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        q, k, v = (split_heads(part, self.head_dim) for part in self.wqkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        out = cache.attend(q, k, v) if cache else F.scaled_dot_product_attention(q, k, v, is_causal=True)
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
    """Block number `index`. Its optional parts are absent where they would do nothing."""

    recompute_unit = "block"

    def __init__(self, config: GPTConfig, layers: Layers, index: int):
        super().__init__()
        width, depth = config.transformer.width, config.transformer.layers
        self.attention_norm = layers.per_token(RMSNorm(width, config.norm_eps))
        self.attention = CausalAttention(config, layers)
        self.ffn_norm = layers.per_token(RMSNorm(width, config.norm_eps))
        self.feed_forward = FeedForward(config, layers)
        self.attention_dropout = layers.dropout(config.residual_dropout)
        self.ffn_dropout = layers.dropout(config.residual_dropout)
        path = config.drop_path * index / max(depth - 1, 1)
        self.attention_path, self.ffn_path = (DropPath(path) if path else nn.Identity() for _ in range(2))
        if config.conditioning == "adaln":
            self.adaLN_modulation = adaptive_projection(width, 6)
        elif config.conditioning == "simple_adaln":
            self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, width))

    def forward(self, x: Tensor, modulation: Tensor | None = None, rotation: Tensor | None = None,
                cache: KeyValueCache | None = None) -> Tensor:
        if modulation is None:
            x = x + self._attend(self.attention_norm(x), rotation, cache)
            return x + self._feed(self.ffn_norm(x))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(1)
        x = x + gate_a * self._attend(modulate(self.attention_norm(x), shift_a, scale_a), rotation, cache)
        return x + gate_m * self._feed(modulate(self.ffn_norm(x), shift_m, scale_m))

    def _attend(self, x: Tensor, rotation: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        return self.attention_path(self.attention_dropout(self.attention(x, rotation, cache)))

    def _feed(self, x: Tensor) -> Tensor:
        return self.ffn_path(self.ffn_dropout(self.feed_forward(x)))


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
        self.class_names: Sequence[str] = ()  # where they are known
        width = config.transformer.width
        self.cls_embedding = ClassEmbedding(config.num_classes, width)
        self.tok_embeddings = layers.vocab_embedding(config.vocab_size, width)
        if config.positions == "learned":
            self.positional_embedding = nn.Parameter(torch.empty(config.sequence_length + 1, width))
        # Made when first needed, and no buffer: neither casts nor checkpoints are to reach it.
        self.rotary: Tensor | None = None
        self.cut, self.full_vocabulary = layers.tokens, layers.full_features
        self.token_dropout = layers.dropout(config.token_dropout)
        self.layers = nn.ModuleList(Block(config, layers, index) for index in range(config.transformer.layers))
        self.norm = layers.per_token(RMSNorm(width, config.norm_eps))
        self.output = layers.vocab_head(width, config.vocab_size)
        if config.conditioning == "simple_adaln":
            self.adaLN = adaptive_projection(width, 6)
        if config.conditioning != "prefix":
            self.final_adaLN = adaptive_projection(width, 2)

    def init_fn(self, name: str) -> Fill | None:
        """N(0, 0.02) for weights, N(0, 1/width) for positions and for each block's own offsets of a shared modulation.

        Projections to modulations are zero, and so is the head: the first loss is ln(vocab).
        """
        if name == "positional_embedding" or name.endswith("ada_gss"):
            return normal(self.config.transformer.width**-0.5)
        if name == "output.weight" or "adaLN" in name:
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
        each, float32 (B, t + 1), in nats, and the logits are never all held.
        """
        modulations = self.modulations(classes)
        x = self._final_norm(self._blocks(codes, classes, modulations), modulations)
        if targets is not None:
            return self.output(x, targets.t()).t()
        return self.full_vocabulary(self.output(x)).transpose(0, 1).float()

    def hidden_states(self, codes: Tensor, classes: Tensor, *, depth: int | None = None) -> Tensor:
        """The residual stream (t + 1, B, width) after block `depth` (counted from 1; None: after the last)."""
        return self.cut.gather(self._blocks(codes, classes, self.modulations(classes), depth))

    def modulations(self, classes: Tensor) -> Modulations:
        """What classes (B,) do to every block and to the final norm, at all positions: see models.adaln."""
        if self.config.conditioning == "prefix":
            return [None] * (len(self.layers) + 1)
        condition = self._place(self.cls_embedding(classes)[None], 0)[0]
        blocks = cast("Iterable[Block]", self.layers)
        if self.config.conditioning == "adaln":
            found = [project(block.adaLN_modulation, condition) for block in blocks]
        else:
            shared = project(self.adaLN, condition)
            found = [shared + block.ada_gss[0] for block in blocks]
        # Each rank may hold a part of the tokens only, and knows their part of the gradient.
        return [self.cut.copy(part) for part in (*found, project(self.final_adaLN, condition))]

    def _blocks(self, codes: Tensor, classes: Tensor, modulations: Modulations, depth: int | None = None) -> Tensor:
        """`hidden_states`, of this rank's tokens."""
        tokens = torch.cat([self.cls_embedding(classes)[:, None], self.tok_embeddings(codes)], dim=1)
        positions = slice(tokens.shape[1])
        x = self.token_dropout(self.cut.scatter(self._place(tokens.transpose(0, 1), positions)))
        rotation = self._rotation(positions, x.device)
        for block, modulation in zip(self.layers[:depth], modulations, strict=False):
            x = block(x, modulation, rotation)
        return x

    def _place(self, x: Tensor, positions: slice | int | Tensor) -> Tensor:
        """Embeddings (T, B, width) with what is added for their positions: a slice, or the one of a single token."""
        if self.config.positions != "learned":
            return x
        return x + self.positional_embedding[positions].reshape(-1, 1, x.shape[-1]).to(x.dtype)

    def _rotation(self, positions: slice | int | Tensor, device: torch.device) -> Tensor | None:
        """Rows (T, 2, head_dim) of the rotary table, for a slice of positions or a single one."""
        if self.config.positions != "rope_2d":
            return None
        if self.rotary is None or self.rotary.device != device:
            self.rotary = rotary_table(self.config.grid, self.config.head_dim, device)
        return self.rotary[positions].reshape(-1, *self.rotary.shape[1:])

    def _final_norm(self, x: Tensor, modulations: Modulations) -> Tensor:
        x, modulation = self.norm(x), modulations[-1]
        return x if modulation is None else modulate(x, *modulation.unbind(1))

    def decode_step(self, tokens: Tensor, position: int | Tensor, caches: Sequence[KeyValueCache],
                    modulations: Modulations | None = None) -> Tensor:
        """One cached step: logits (B, vocab) float32 of the code after `position`.

        tokens (B,) are classes at position 0 and the codes generated last at every later position. A position after
        the first may be an int64 tensor (1,) on the device, so that the same step serves them all. `modulations` are
        those of the classes; a model whose class is only a prefix needs none.
        """
        modulations = modulations or [None] * (len(self.layers) + 1)
        embedding = self.tok_embeddings if isinstance(position, Tensor) or position else self.cls_embedding
        x = self._place(embedding(tokens)[None], position)
        rotation = self._rotation(position, x.device)
        for block, modulation, cache in zip(self.layers, modulations, caches, strict=False):
            x = block(x, modulation, rotation, cache)
        return self.full_vocabulary(self.output(self._final_norm(x, modulations)))[0].float()
