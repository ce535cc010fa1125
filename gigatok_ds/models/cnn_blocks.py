"""Building blocks of the convolutional encoder and decoder. Feature maps are (B, C, H, W), in any memory layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.kernels import group_norm_ops as fused
from gigatok_ds.models.group_norm import GroupNorm, GroupNormSiLU
from gigatok_ds.models.layout import layout_of
from gigatok_ds.parallel.dropout import MapDropout

GROUPS, EPS = 32, 1e-6


def norm_silu(channels: int) -> GroupNormSiLU:
    return GroupNormSiLU(GROUPS, channels, eps=EPS)


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice; a 1x1 convolution carries the shortcut where the width changes."""

    recompute_unit = "cnn"

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = norm_silu(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm_silu(out_channels)
        self.dropout = MapDropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.dropout(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of the feature map, added to its input."""

    recompute_unit = "cnn"

    def __init__(self, channels: int):
        super().__init__()
        self.norm = GroupNorm(GROUPS, channels, eps=EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # One head, because fused attention asks for four axes.
        q, k, v = (projection(h).flatten(2).transpose(1, 2)[:, None] for projection in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the side: zero padding at the right and bottom only, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class NearestUpsample(nn.Module):
    """Double the side by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def depth_to_space(x: Tensor) -> Tensor:
    """(B, 4C, H, W) to (B, C, 2H, 2W) in ONNX's DCR order: output[c, 2y+r, 2x+s] = input[(2r+s)*C + c, y, x].

    This is not torch's pixel_shuffle, which is the CRD order. The memory layout stays.
    """
    b, c4, h, w = x.shape
    if layout_of(x) == torch.channels_last:
        x = x.permute(0, 2, 3, 1).reshape(b, h, w, 2, 2, c4 // 4).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(b, 2 * h, 2 * w, c4 // 4).permute(0, 3, 1, 2)
    x = x.reshape(b, 2, 2, c4 // 4, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(b, c4 // 4, 2 * h, 2 * w)


class DepthToSpaceUpsample(nn.Module):
    """Double the side: a 3x3 convolution to four times the channels, then depth to space."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return depth_to_space(self.conv1(x))


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and bias come from the statistics of a style map (AdaIN with 32 groups).

    scale = gamma(sqrt(var + eps)), bias = beta(mean), with the unbiased variance over positions and no "+1".
    """

    def __init__(self, channels: int, style_channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=EPS, affine=False)
        self.gamma = nn.Linear(style_channels, channels)
        self.beta = nn.Linear(style_channels, channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        variance, mean = torch.var_mean(style.flatten(2).float(), dim=2, unbiased=True)
        scale = self.gamma((variance + 1e-6).sqrt().to(style.dtype))
        bias = self.beta(mean.to(style.dtype))
        if fused.suits(x):
            return fused.group_norm(x, scale, bias, GROUPS, EPS, silu=False)
        return scale[:, :, None, None] * self.norm(x) + bias[:, :, None, None]
