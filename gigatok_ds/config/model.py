"""What a network is: everything needed to rebuild a tokenizer or a GPT, and nothing about how it was trained.

These dataclasses are plain, so that a standalone checkpoint loads with torch and safetensors alone; recipes are
validated against them by `config.load`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from gigatok_ds.errors import InputError
from gigatok_ds.plain import from_plain


def at_least(minimum: float, section: str, **values: float | None) -> None:
    """Refuse values below `minimum`, naming them as settings of `section`. None passes."""
    for name, value in values.items():
        if value is not None and value < minimum:
            raise InputError(f"{section}.{name} is {value}; it must be at least {minimum}")


def probability(section: str, **values: float) -> None:
    """Refuse values outside [0, 1), naming them as settings of `section`."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise InputError(f"{section}.{name} is {value}; it must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """Width, depth and number of attention heads of one transformer."""

    width: int
    layers: int
    heads: int

    def __post_init__(self) -> None:
        at_least(1, "transformer", width=self.width, layers=self.layers, heads=self.heads)
        if self.width % self.heads:
            raise InputError(f"transformer width {self.width} is not a multiple of its {self.heads} heads")


# Tokenizer transformers; the head dimension is always 64.
TRANSFORMER_SIZES = {
    "tiny": TransformerSize(width=256, layers=4, heads=4),
    "small": TransformerSize(width=512, layers=6, heads=8),
    "base": TransformerSize(width=768, layers=12, heads=12),
    "large": TransformerSize(width=1024, layers=24, heads=16),
    "xl": TransformerSize(width=1280, layers=36, heads=20),
    "xxl": TransformerSize(width=1536, layers=48, heads=24),
    "xxxl": TransformerSize(width=2560, layers=48, heads=40),
}

# Generators (LlamaGen's sizes).
GPT_SIZES = {
    "GPT-B": TransformerSize(width=768, layers=12, heads=12),
    "GPT-L": TransformerSize(width=1024, layers=24, heads=16),
    "GPT-XL": TransformerSize(width=1280, layers=36, heads=20),
    "GPT-XXL": TransformerSize(width=1536, layers=48, heads=24),
    "GPT-XXXL": TransformerSize(width=2560, layers=48, heads=40),
    "GPT-1B": TransformerSize(width=2048, layers=22, heads=32),
    "GPT-3B": TransformerSize(width=3200, layers=24, heads=32),
    "GPT-7B": TransformerSize(width=4096, layers=32, heads=32),
}


def resolve_size(size: str | TransformerSize | dict[str, Any], table: dict[str, TransformerSize],
                 what: str) -> TransformerSize:
    """The size named `size` in `table`, or `size` itself when it is spelled out."""
    if isinstance(size, TransformerSize):
        return size
    if isinstance(size, dict):
        return TransformerSize(**size)
    if size not in table:
        raise InputError(
            f"{what}: unknown size {size!r}; choose one of {', '.join(table)}, or give width, layers and heads"
        )
    return table[size]


@dataclass(frozen=True, kw_only=True)
class CNNConfig:
    """The convolutional encoder and decoder around the transformers."""

    base_channels: int = 128
    encoder_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    residual_blocks: int = 2
    attention: bool = False
    adaptive_group_norm: bool = True
    upsample: Literal["depth_to_space", "nearest"] = "depth_to_space"

    def __post_init__(self) -> None:
        if len(self.encoder_multipliers) != len(self.decoder_multipliers):
            raise InputError("cnn.encoder_multipliers and cnn.decoder_multipliers must have the same number of levels")
        multipliers = (*self.encoder_multipliers, *self.decoder_multipliers)
        at_least(1, "cnn", multipliers=min(multipliers, default=0), base_channels=self.base_channels)
        at_least(0, "cnn", residual_blocks=self.residual_blocks)
        if self.residual_blocks == 0 and set(self.encoder_multipliers) != {1}:
            raise InputError(f"cnn.residual_blocks is 0, so nothing changes the encoder's width, but "
                             f"cnn.encoder_multipliers are {list(self.encoder_multipliers)}; use at least one residual "
                             "block, or multipliers of 1")
        if self.base_channels % 32:
            raise InputError(f"cnn.base_channels is {self.base_channels}; it must be a multiple of 32 (group norm)")

    @property
    def downscale(self) -> int:
        """Image side divided by feature-map side."""
        sides: int = 2 ** (len(self.encoder_multipliers) - 1)
        return sides


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """The vector quantizer: codebook shape, and how the gradient passes it."""

    codebook_size: int = 16384
    codebook_dim: int = 8
    l2_normalized: bool = True
    gradient: Literal["straight_through", "rotation"] = "rotation"

    def __post_init__(self) -> None:
        at_least(1, "quantizer", codebook_size=self.codebook_size, codebook_dim=self.codebook_dim)


@dataclass(frozen=True, kw_only=True)
class SemanticHeadConfig:
    """The MLP that predicts a teacher's features from the decoder's tokens after layer `depth` (counted from 1)."""

    depth: int = 3
    teacher_width: int = 768

    def __post_init__(self) -> None:
        at_least(1, "semantic_head", teacher_width=self.teacher_width)


ENCODING_PARTS = ("cnn_encoder", "encoder", "quant_conv", "quantizer")  # of a tokenizer: codes depend on these alone


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A GigaTok tokenizer: CNN encoder, transformer encoder, quantizer, transformer decoder, CNN decoder."""

    layout: Literal["1d", "2d"]
    encoder: str | TransformerSize
    decoder: str | TransformerSize
    image_size: int = 256
    latent_tokens: int = 256
    z_channels: int = 256
    dropout: float = 0.0
    qk_norm: bool = False
    cnn: CNNConfig = CNNConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    semantic_head: SemanticHeadConfig | None = SemanticHeadConfig()
    # 1-D layout: where the latent tokens and the decoder's grid queries start from.
    latent_query: Literal["multi_level", "learned", "mean"] = "multi_level"
    grid_query: Literal["first_token", "learned"] = "first_token"
    # 2-D layout: plain self-attention, the 1-D model's layer attending to its own input, or two self-attentions.
    layer_2d: Literal["self", "decoder", "double_self"] = "decoder"

    def __post_init__(self) -> None:
        at_least(1, "model", latent_tokens=self.latent_tokens, z_channels=self.z_channels)
        probability("model", dropout=self.dropout)
        for name in ("encoder", "decoder"):
            size = resolve_size(getattr(self, name), TRANSFORMER_SIZES, name)
            depth = self.semantic_head.depth if self.semantic_head else 1
            if name == "decoder" and not 1 <= depth <= size.layers:
                raise InputError(f"semantic_head.depth is {depth}; the decoder has layers 1 to {size.layers}")
        if self.image_size < 1 or self.image_size % self.cnn.downscale:
            raise InputError(f"image_size {self.image_size} is not a multiple of the CNN's downscale "
                             f"{self.cnn.downscale}")
        if self.layout == "2d" and self.latent_tokens != self.grid**2:
            raise InputError(f"latent_tokens is {self.latent_tokens}; a 2d tokenizer has one per grid cell, "
                             f"{self.grid**2}")
        if self.layout == "1d" and self.latent_query == "multi_level":
            self._check_levels()

    def _check_levels(self) -> None:
        """The finest of the levels that queries are pooled at has half of the tokens, and must divide the grid."""
        tokens, allowed = self.latent_tokens, [2**power for power in range(2 * self.grid.bit_length())
                                               if self.grid % 2 ** (power // 2) == 0]
        if tokens in allowed:
            return
        nearest = [*[number for number in allowed if number < tokens][-1:],
                   *[number for number in allowed if number > tokens][:1]]
        sizes = ""
        if not tokens & (tokens - 1):
            side = 2 ** (tokens.bit_length() // 2) * self.cnn.downscale
            low = self.image_size // side * side
            sizes = f", or image_size {f'{low} or {low + side}' if low else side}"
        raise InputError(
            f"latent_tokens is {tokens}; latent_query multi_level needs a power of two whose levels divide the grid, "
            f"{self.grid} x {self.grid} at image_size {self.image_size}: next are "
            f"{' and '.join(map(str, nearest))}{sizes}"
        )

    @property
    def parts(self) -> tuple[str, ...]:
        """What `training.freeze` may name, from an image to its reconstruction: the modules of models.tokenizer."""
        return (*ENCODING_PARTS, "post_quant_conv", "decoder", "cnn_decoder")

    @property
    def before_last_layer(self) -> tuple[str, ...]:
        """Parts with something before the last layer of one of the transformers; see engine.depth."""
        return ("cnn_encoder", "encoder", "post_quant_conv", "decoder")

    @property
    def grid(self) -> int:
        """Side of the feature map between CNN and transformer."""
        return self.image_size // self.cnn.downscale

    @property
    def encoder_size(self) -> TransformerSize:
        return resolve_size(self.encoder, TRANSFORMER_SIZES, "encoder")

    @property
    def decoder_size(self) -> TransformerSize:
        return resolve_size(self.decoder, TRANSFORMER_SIZES, "decoder")


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """A class-conditional autoregressive transformer over codes.

    positions: "learned", added to the embeddings, or "rope_2d", LlamaGen's rotation of queries and keys by row and
    column. conditioning: the class is a "prefix" token always; with "adaln" it also shifts, scales and gates every
    block through projections of each block's own, with "simple_adaln" through one that all blocks share. drop_path is
    the last block's rate of stochastic depth; from the first block's 0 it grows linearly. The original drops no
    residuals where it drops paths: set residual_dropout to 0 to do as it does.
    """

    size: str | TransformerSize
    vocab_size: int = 16384
    sequence_length: int = 256
    num_classes: int = 1000
    class_dropout: float = 0.1
    token_dropout: float = 0.1
    residual_dropout: float = 0.1
    drop_path: float = 0.0
    norm_eps: float = 1e-5
    qk_norm: bool = False
    positions: Literal["learned", "rope_2d"] = "learned"
    conditioning: Literal["prefix", "adaln", "simple_adaln"] = "prefix"

    def __post_init__(self) -> None:
        size = resolve_size(self.size, GPT_SIZES, "size")
        at_least(1, "model", vocab_size=self.vocab_size, sequence_length=self.sequence_length,
                 num_classes=self.num_classes)
        probability("model", class_dropout=self.class_dropout, token_dropout=self.token_dropout,
                    residual_dropout=self.residual_dropout, drop_path=self.drop_path)
        if self.positions == "rope_2d":
            if self.grid**2 != self.sequence_length:
                raise InputError(f"model.sequence_length is {self.sequence_length}; positions rope_2d needs a square "
                                 f"number, the cells of a grid, such as {self.grid**2} or {(self.grid + 1) ** 2}")
            if self.head_dim % 4:
                raise InputError(f"model.size has heads of {self.head_dim} features; positions rope_2d needs "
                                 "a multiple of 4")
        if self.drop_path and size.layers == 1:
            raise InputError(f"model.drop_path is {self.drop_path}, but it does nothing in a model of one layer; "
                             "set it to 0")

    @property
    def parts(self) -> tuple[str, ...]:
        """What `training.freeze` may name: the modules and parameters of models.gpt."""
        positions = ("positional_embedding",) if self.positions == "learned" else ()
        shared = ("adaLN",) if self.conditioning == "simple_adaln" else ()
        final = () if self.conditioning == "prefix" else ("final_adaLN",)
        return ("cls_embedding", "tok_embeddings", *positions, "layers", "norm", "output", *shared, *final)

    @property
    def before_last_layer(self) -> tuple[str, ...]:
        """Parts with something before the last layer; see engine.depth."""
        behind = ("norm", "output", "final_adaLN", *(("layers",) if self.transformer.layers == 1 else ()))
        return tuple(part for part in self.parts if part not in behind)

    @property
    def grid(self) -> int:
        """Side of the grid that a sequence fills row by row, where positions are two-dimensional."""
        return math.isqrt(self.sequence_length)

    @property
    def head_dim(self) -> int:
        return self.transformer.width // self.transformer.heads

    @property
    def transformer(self) -> TransformerSize:
        return resolve_size(self.size, GPT_SIZES, "size")

    @property
    def ffn_width(self) -> int:
        """SwiGLU hidden width: two thirds of four times the width, rounded up to a multiple of 256."""
        return -(-int(2 * (4 * self.transformer.width) / 3) // 256) * 256


def tokenizer_config_from_dict(data: dict[str, Any]) -> TokenizerConfig:
    """Rebuild a TokenizerConfig from the plain dictionary that a standalone checkpoint stores.

    Raises InputError for an unknown or missing name, another type, or a value that is not allowed.
    """
    config: TokenizerConfig = from_plain(TokenizerConfig, data, "model")
    return config


def gpt_config_from_dict(data: dict[str, Any]) -> GPTConfig:
    """Rebuild a GPTConfig from the plain dictionary that a standalone checkpoint stores; as above."""
    config: GPTConfig = from_plain(GPTConfig, data, "model")
    return config
