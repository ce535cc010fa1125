"""Images as files hold them, and how close a reconstruction is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """trunc(clamp(127.5 x + 128, 0, 255)) of floats in [-1, 1], any shape; maps k / 127.5 - 1 back to k."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def psnr(images: Tensor, restored: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image: -10 log10 of the mean squared error for data in [0, 1].

    images, restored: (B, 3, H, W) floats in [-1, 1]. The restored image is measured as a file would hold it,
    in 8 bits; the original is not rounded. Returns (B,) float64, infinite where nothing differs.
    """
    difference = to_uint8(restored).double() / 255 - (images.double() + 1) / 2
    return -10 * torch.log10(difference.square().flatten(1).mean(dim=1))


def make_grid(images: Tensor, *, gap: int = 0, background: int = 255) -> np.ndarray:
    """Lay images (R, C, 3, H, W), uint8 or floats in [-1, 1], out in R rows: uint8 (height, width, 3).

    `gap` pixels of gray level `background` separate neighbours; there is no outer margin.
    """
    images = images.detach().cpu()
    if images.is_floating_point():
        images = to_uint8(images)
    rows, columns, channels, height, width = images.shape
    padded = torch.full((rows, columns, channels, height + gap, width + gap), background, dtype=torch.uint8)
    padded[..., :height, :width] = images
    grid = padded.permute(0, 3, 1, 4, 2).reshape(rows * (height + gap), columns * (width + gap), channels)
    return grid[: grid.shape[0] - gap, : grid.shape[1] - gap].numpy()
