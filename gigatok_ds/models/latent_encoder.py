"""Transformer encoders: the CNN's feature map to latent tokens (1-D) or to a map of the same grid (2-D)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.config.model import TokenizerConfig, TransformerSize
from gigatok_ds.models.attention import TransformerLayer
from gigatok_ds.models.initialisation import Fill, normal
from gigatok_ds.models.positions import level_shape
from gigatok_ds.parallel.layers import Layers


def map_to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) to row-major tokens (H * W, B, C)."""
    return x.flatten(2).permute(2, 0, 1)


def tokens_to_map(x: Tensor, height: int, width: int) -> Tensor:
    """Row-major tokens (H * W, B, C) to (B, C, H, W)."""
    return x.permute(1, 2, 0).unflatten(2, (height, width))


class PositionTables(nn.Module):
    """A module whose own parameters are all tables (tokens, 1, width), of N(0, 1/width) at first."""

    def __init__(self, width: int, **tokens: int):
        super().__init__()
        self._std = width**-0.5
        for name, count in tokens.items():
            self.register_parameter(name, nn.Parameter(torch.empty(count, 1, width)))

    def init_fn(self, name: str) -> Fill | None:
        return None if "." in name else normal(self._std)


def multi_level_pool(x: Tensor, tokens: int) -> Tensor:
    """Average-pool a map (B, C, H, W) at log2(tokens) + 1 levels into (tokens, B, C), coarse to fine.

    Levels 0 and 1 are both the global mean; level i >= 1 has 2^(i-1) cells, as square as possible and wider than
    high, which overlap where the map cannot be cut into them. Within a level cells are row-major.
    """
    height, width = x.shape[-2:]
    levels = []
    for level in range(tokens.bit_length()):
        rows, columns = level_shape(level)
        if height % rows or width % columns:
            levels.append(map_to_tokens(F.adaptive_avg_pool2d(x, (rows, columns))))
        else:
            levels.append(map_to_tokens(F.avg_pool2d(x, (height // rows, width // columns))))
    return torch.cat(levels)


class LatentEncoder(PositionTables):
    """1-D encoder: learned or pooled latent queries attend to the feature map.

    Features (B, z, G, G) to latents (B, z, 1, T).
    """

    positional_embedding: nn.Parameter
    latent_token_positional_embedding: nn.Parameter
    query_1d: nn.Parameter  # if they are learned

    def __init__(self, config: TokenizerConfig, layers: Layers):
        size, tokens = config.encoder_size, config.latent_tokens
        tables = {"positional_embedding": config.grid**2, "latent_token_positional_embedding": tokens}
        super().__init__(size.width, **tables | ({"query_1d": tokens} if config.latent_query == "learned" else {}))
        self.cut = layers.tokens
        self.query = config.latent_query
        self.tokens = tokens
        self.ln_pre = nn.LayerNorm(config.z_channels)
        self.encoder_embed = nn.Linear(config.z_channels, size.width)
        if self.query != "learned":
            self.global_proj = nn.Linear(size.width, size.width)
        self.transformer = nn.ModuleList(
            TransformerLayer(size.width, size.heads, layers, second="cross", dropout=config.dropout,
                             qk_norm=config.qk_norm)
            for _ in range(size.layers)
        )
        self.ln_post = nn.LayerNorm(size.width)
        self.conv_out = nn.Conv2d(size.width, config.z_channels, 1)

    def initial_queries(self, memory: Tensor, grid: tuple[int, int]) -> Tensor:
        """Queries (T, B, W) from the embedded feature map (R * C, B, W) of a grid of R x C cells."""
        if self.query == "learned":
            return self.query_1d.to(memory.dtype).expand(-1, memory.shape[1], -1)
        if self.query == "mean":
            return self.global_proj(memory.mean(0, keepdim=True)).expand(self.tokens, -1, -1)
        return self.global_proj(multi_level_pool(tokens_to_map(memory, *grid), self.tokens))

    def forward(self, feature: Tensor) -> Tensor:
        memory = self.encoder_embed(self.ln_pre(map_to_tokens(feature)))
        x = self.initial_queries(memory, (feature.shape[-2], feature.shape[-1]))
        x, memory = self.cut.scatter(x), self.cut.scatter(memory)
        position = self.cut.scatter(self.latent_token_positional_embedding)
        memory_position = self.cut.scatter(self.positional_embedding)
        for layer in self.transformer:
            x = layer(x, position, memory, memory_position)
        return self.conv_out(tokens_to_map(self.ln_post(self.cut.gather(x)), 1, self.tokens))


class GridEncoder(PositionTables):
    """2-D encoder: the tokens are the grid's cells throughout. Features (B, z, G, G) to (B, z, G, G)."""

    positional_embedding: nn.Parameter

    def __init__(self, config: TokenizerConfig, layers: Layers):
        size = config.encoder_size
        super().__init__(size.width, positional_embedding=config.grid**2)
        self.cut = layers.tokens
        self.ln_pre = nn.LayerNorm(config.z_channels)
        self.encoder_embed = nn.Linear(config.z_channels, size.width)
        self.transformer = GridTransformer(config, size, layers)
        self.ln_post = nn.LayerNorm(size.width)
        self.conv_out = nn.Conv2d(size.width, config.z_channels, 1)

    def forward(self, feature: Tensor) -> Tensor:
        position = self.cut.scatter(self.positional_embedding)
        x = self.cut.scatter(self.encoder_embed(self.ln_pre(map_to_tokens(feature))))
        x = self.transformer.start(x, position)
        for layer in self.transformer:
            x = self.transformer.step(layer, x, position)
        return self.conv_out(tokens_to_map(self.ln_post(self.cut.gather(x)), *feature.shape[-2:]))


class GridTransformer(nn.ModuleList):
    """The layers of a 2-D model and how each uses the position table (config.layer_2d).

    "self" adds the table once to the input; "decoder" gives every layer its own input as un-normalised memory, with
    the table on both sides; "double_self" adds the table in both self-attentions of every layer.
    """

    SECOND: ClassVar = {"self": None, "decoder": "cross", "double_self": "self"}

    def __init__(self, config: TokenizerConfig, size: TransformerSize, layers: Layers):
        super().__init__(
            TransformerLayer(size.width, size.heads, layers, second=self.SECOND[config.layer_2d],
                             dropout=config.dropout, qk_norm=config.qk_norm)
            for _ in range(size.layers)
        )
        self.kind = config.layer_2d

    def start(self, x: Tensor, position: Tensor) -> Tensor:
        return x + position.to(x.dtype) if self.kind == "self" else x

    def step(self, layer: nn.Module, x: Tensor, position: Tensor) -> Tensor:
        if self.kind == "self":
            return layer(x, None)
        if self.kind == "decoder":
            return layer(x, position, memory=x, memory_position=position)
        return layer(x, position)
