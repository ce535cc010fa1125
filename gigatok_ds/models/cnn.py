"""The convolutional encoder (image to feature map) and decoder (feature map to image)."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from gigatok_ds.config.model import CNNConfig
from gigatok_ds.models.cnn_blocks import (
    AdaptiveGroupNorm,
    AttentionBlock,
    DepthToSpaceUpsample,
    Downsample,
    NearestUpsample,
    ResidualBlock,
    norm_silu,
)
from gigatok_ds.models.layout import laid_out


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention if asked for, then an optional resampler."""

    def __init__(self, channels: list[int], *, attention: bool, dropout: float):
        super().__init__()
        pairs = list(itertools.pairwise(channels))
        self.res = nn.ModuleList(ResidualBlock(i, o, dropout) for i, o in pairs)
        self.attn = nn.ModuleList(AttentionBlock(o) for _, o in pairs) if attention else None
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x = block(x)
            if self.attn is not None:
                x = self.attn[index](x)
        for resampler in (self.downsample, self.upsample):
            if resampler is not None:
                x = resampler(x)
        return x


def middle(channels: int, *, attention: bool, dropout: float) -> nn.Sequential:
    blocks: list[nn.Module] = [ResidualBlock(channels, channels, dropout), ResidualBlock(channels, channels, dropout)]
    if attention:
        blocks.insert(1, AttentionBlock(channels))
    return nn.Sequential(*blocks)


class CNNEncoder(nn.Module):
    """Image (B, 3, S, S) in [-1, 1] to features (B, z_channels, S / downscale, S / downscale)."""

    def __init__(self, config: CNNConfig, z_channels: int, dropout: float = 0.0):
        super().__init__()
        widths = [config.base_channels * m for m in config.encoder_multipliers]
        options = {"dropout": dropout}
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        incoming = config.base_channels
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            channels = [incoming] + [width] * config.residual_blocks
            level = Level(channels, attention=config.attention and last, **options)
            level.downsample = None if last else Downsample(width)
            self.conv_blocks.append(level)
            incoming = width
        self.mid = middle(incoming, attention=config.attention, **options)
        self.norm_out = norm_silu(incoming)
        self.conv_out = nn.Conv2d(incoming, z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(laid_out(x))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class CNNDecoder(nn.Module):
    """Features (B, z_channels, g, g) to an image (B, 3, S, S), nominally in [-1, 1] but not clamped.

    The incoming features are also the style of every adaptive norm, which replaces the map before the first
    residual block of each level.
    """

    def __init__(self, config: CNNConfig, z_channels: int, dropout: float = 0.0):
        super().__init__()
        widths = [config.base_channels * m for m in reversed(config.decoder_multipliers)]
        options = {"dropout": dropout}
        upsample = DepthToSpaceUpsample if config.upsample == "depth_to_space" else NearestUpsample
        incoming = widths[0]
        self.conv_in = nn.Conv2d(z_channels, incoming, 3, padding=1)
        self.mid = middle(incoming, attention=config.attention, **options)
        self.conv_blocks = nn.ModuleList()
        self.adaptive = nn.ModuleList() if config.adaptive_group_norm else None
        for index, width in enumerate(widths):
            if self.adaptive is not None:
                self.adaptive.append(AdaptiveGroupNorm(incoming, z_channels))
            channels = [incoming] + [width] * (config.residual_blocks + 1)
            level = Level(channels, attention=config.attention and index == 0, **options)
            level.upsample = None if index == len(widths) - 1 else upsample(width)
            self.conv_blocks.append(level)
            incoming = width
        self.norm_out = norm_silu(incoming)
        self.conv_out = nn.Conv2d(incoming, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = laid_out(z)
        x = self.mid(self.conv_in(z))
        for index, level in enumerate(self.conv_blocks):
            if self.adaptive is not None:
                x = self.adaptive[index](x, z)
            x = level(x)
        return self.conv_out(self.norm_out(x))
