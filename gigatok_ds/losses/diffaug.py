"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020, arXiv:2006.10738).

Every image is moved, recoloured and loses a rectangle. Random numbers are uniform in [0, 1), one per image,
so each operation is a plain function of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gigatok_ds.streams import SampleDraws
from gigatok_ds.transfer import to_device

TRANSLATION = 0.125  # of the side, at most
CUTOUT = 0.2  # of the side


def diff_augment(images: Tensor, draws: SampleDraws | None) -> Tensor:
    """A random version of each of images (B, 3, H, W) in [-1, 1], float32; it may leave [-1, 1].

    draws gives each image its random numbers; None takes them from torch's own generator.
    """
    u = to_device(draws.per_sample(7) if draws else torch.rand(7, len(images)), images.device)
    moved = translate(images.float(), u[0], u[1])
    return cut_out(recolour(moved, u[2], u[3], u[4]), u[5], u[6])


def translate(images: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Shift each image by whole pixels, up to an eighth of its side; zeros come in from outside."""
    rows, rows_inside = _shifted(images.shape[2], vertical)
    columns, columns_inside = _shifted(images.shape[3], horizontal)
    moved = images.gather(2, rows[:, None, :, None].expand_as(images))
    moved = moved.gather(3, columns[:, None, None, :].expand_as(images))
    return moved * (rows_inside[:, None, :, None] & columns_inside[:, None, None, :])


def _shifted(size: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """Source index (B, size) of each position, and whether it lies inside.

    Indices wrap around, so that none is read twice and the backward pass adds nothing up in random order.
    """
    reach = round(TRANSLATION * size)
    shift = (u * (2 * reach + 1)).floor().long() - reach
    source = torch.arange(size, device=u.device) + shift[:, None]
    return source % size, (source >= 0) & (source < size)


def recolour(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Add up to 0.5 either way, scale the distance from gray by 0 to 2, that from the mean by 0.5 to 1.5."""
    brightness, saturation, contrast = (u[:, None, None, None] for u in (brightness, saturation, contrast))
    images = images + (brightness - 0.5)
    gray = images.mean(dim=1, keepdim=True)
    images = (images - gray) * (2 * saturation) + gray
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def cut_out(images: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Zero a rectangle of a fifth of each side, centred anywhere in the image and clipped at its border."""
    rows = _covered(images.shape[2], vertical)
    columns = _covered(images.shape[3], horizontal)
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _covered(size: int, u: Tensor) -> Tensor:
    """Whether each position (B, size) lies under the rectangle."""
    extent = round(CUTOUT * size)
    start = (u * (size + 1 - extent % 2)).floor().long() - extent // 2
    offset = torch.arange(size, device=u.device) - start[:, None]
    return (offset >= 0) & (offset < extent)
