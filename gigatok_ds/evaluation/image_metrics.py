"""Images as files hold them, and how close a reconstruction is."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gigatok_ds.errors import InputError

SSIM_WINDOW = 7


def to_uint8(images: Tensor) -> Tensor:
    """trunc(clamp(127.5 x + 128, 0, 255)) of floats in [-1, 1], any shape; maps k / 127.5 - 1 back to k."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def psnr(images: Tensor, restored: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image: -10 log10 of the mean squared error for data in [0, 1].

    images, restored: (B, 3, H, W) floats in [-1, 1]. The restored image is measured as a file would hold it,
    in 8 bits; the original is not rounded. Returns (B,) float64, infinite where nothing differs.
    """
    ours, theirs = _in_unit_range(images, restored)
    difference = theirs - ours
    return -10 * torch.log10(difference.square().flatten(1).mean(dim=1))


def ssim(images: Tensor, restored: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each image, of the same two as `psnr`; (B,) float64, 1 at best.

    The mean over colours and all whole windows of 7 x 7 equally weighted pixels, with sample variances, k1 = 0.01 and
    k2 = 0.03. Its range of data is 2, as in the original, although pixels are compared in [0, 1]: that makes the figure
    larger than usual. Raises InputError for images smaller than a window.
    """
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise InputError(f"SSIM needs images of {SSIM_WINDOW} x {SSIM_WINDOW} pixels or more, "
                         f"not {tuple(images.shape[-2:])}")
    x, y = _in_unit_range(images, restored)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (
        F.avg_pool2d(values, SSIM_WINDOW, stride=1) for values in (x, y, x * x, y * y, x * y))
    per_sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    variances = per_sample * (mean_xx - mean_x.square() + mean_yy - mean_y.square())
    covariance = per_sample * (mean_xy - mean_x * mean_y)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def _in_unit_range(images: Tensor, restored: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 in [0, 1], the restored ones as a file of 8 bits holds them."""
    return (images.double() + 1) / 2, to_uint8(restored).double() / 255


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
