"""Transformer decoders: latent tokens back to the CNN decoder's feature map, with the semantic head on the way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.config.model import TokenizerConfig
from gigatok_ds.models.attention import TransformerLayer
from gigatok_ds.models.latent_encoder import GridTransformer, PositionTables, map_to_tokens, tokens_to_map
from gigatok_ds.parallel.layers import Layers
from gigatok_ds.precision import wide_half


class WideRangeLinear(nn.Linear):
    """A linear layer that computes in a type of float32's range when it is given float16: then its output cannot be
    infinite, of which a cosine would make NaN."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16 or self.weight.dtype == torch.float16:
            dtype = wide_half(x.device)
            return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        return super().forward(x)


def semantic_head(width: int, out: int) -> nn.Sequential:
    """The three-layer MLP whose output is aligned with a teacher's patch features."""
    linear = WideRangeLinear
    return nn.Sequential(
        linear(width, 4 * width), nn.SiLU(), linear(4 * width, 4 * width), nn.SiLU(), linear(4 * width, out)
    )


class _Decoder(PositionTables):
    """What both decoders share: embedding, output, and the optional semantic head after one of the layers."""

    positional_embedding: nn.Parameter

    def __init__(self, config: TokenizerConfig, layers: Layers, **tables: int):
        width = config.decoder_size.width
        super().__init__(width, positional_embedding=config.grid**2, **tables)
        self.grid = config.grid, config.grid  # rows and columns
        self.cut = layers.tokens
        self.ln_pre = nn.LayerNorm(config.z_channels)
        self.decoder_embed = nn.Linear(config.z_channels, width)
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)
        self.semantic_depth = config.semantic_head.depth if config.semantic_head else None
        if config.semantic_head:
            self.distill_mlp = semantic_head(width, config.semantic_head.teacher_width)

    def embed(self, latent: Tensor) -> Tensor:
        """Latents (B, z, H, W), any shape with the right number of positions, to tokens (H * W, B, width)."""
        return self.decoder_embed(self.ln_pre(map_to_tokens(latent)))

    def semantic_feature(self, x: Tensor) -> Tensor:
        """This rank's decoder tokens, of (G * G, B, width), to predicted teacher features (B, G * G, teacher width)."""
        return self.distill_mlp(self.cut.gather(x)).transpose(0, 1)

    def output(self, x: Tensor) -> Tensor:
        return self.conv_out(tokens_to_map(self.ln_post(self.cut.gather(x)), *self.grid))


class LatentDecoder(_Decoder):
    """1-D decoder: grid queries attend to the latent tokens.

    Latents (B, z, 1, T) to features (B, z, G, G). The queries start as copies of the first latent token's embedding
    unless they are learned.
    """

    latent_token_positional_embedding: nn.Parameter
    q_2d: nn.Parameter  # if they are learned

    def __init__(self, config: TokenizerConfig, layers: Layers):
        learned = {"q_2d": config.grid**2} if config.grid_query == "learned" else {}
        super().__init__(config, layers, latent_token_positional_embedding=config.latent_tokens, **learned)
        size = config.decoder_size
        self.query = config.grid_query
        self.transformer = nn.ModuleList(
            TransformerLayer(size.width, size.heads, layers, second="cross", dropout=config.dropout,
                             qk_norm=config.qk_norm)
            for _ in range(size.layers)
        )

    def forward(self, latent: Tensor, *, semantic: bool = False) -> tuple[Tensor, Tensor | None]:
        memory = self.embed(latent)
        start = self.q_2d.to(memory.dtype) if self.query == "learned" else memory[:1]
        x = self.cut.scatter(start.expand(self.grid[0] * self.grid[1], memory.shape[1], -1))
        memory = self.cut.scatter(memory)
        position = self.cut.scatter(self.positional_embedding)
        memory_position = self.cut.scatter(self.latent_token_positional_embedding)
        feature = None
        for depth, layer in enumerate(self.transformer, 1):
            x = layer(x, position, memory, memory_position)
            if semantic and depth == self.semantic_depth:
                feature = self.semantic_feature(x)
        return self.output(x), feature


class GridDecoder(_Decoder):
    """2-D decoder: the tokens are the grid's cells throughout. Latents (B, z, G, G) to (B, z, G, G)."""

    def __init__(self, config: TokenizerConfig, layers: Layers):
        super().__init__(config, layers)
        self.transformer = GridTransformer(config, config.decoder_size, layers)

    def forward(self, latent: Tensor, *, semantic: bool = False) -> tuple[Tensor, Tensor | None]:
        position = self.cut.scatter(self.positional_embedding)
        x = self.transformer.start(self.cut.scatter(self.embed(latent)), position)
        feature = None
        for depth, layer in enumerate(self.transformer, 1):
            x = self.transformer.step(layer, x, position)
            if semantic and depth == self.semantic_depth:
                feature = self.semantic_feature(x)
        return self.output(x), feature
