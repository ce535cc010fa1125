"""Pictures of what a tokenizer makes of a few fixed images, as training goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gigatok_ds.evaluation.image_metrics import make_grid
from gigatok_ds.files import naming_failures, written_aside

PREVIEWS_DIRECTORY = "previews"
COLUMNS = 8
GAP = 2


def preview_grid(originals: Tensor, reconstructions: Tensor) -> np.ndarray:
    """Images (B, 3, S, S) in [-1, 1], each above its reconstruction, up to 8 in a row: uint8 (height, width, 3)."""
    assert originals.shape == reconstructions.shape and len(originals) > 0
    columns = min(COLUMNS, len(originals))
    missing = -len(originals) % columns
    rows = []
    for images in (originals, reconstructions):
        images = images.float().cpu()
        blank = images.new_ones((missing, *images.shape[1:]))
        rows.append(torch.cat([images, blank]).unflatten(0, (-1, columns)))
    return make_grid(torch.stack(rows, dim=1).flatten(0, 1), gap=GAP)


def save_preview(run_dir: Path, step: int, image: np.ndarray) -> Path:
    """Write an image, uint8 (H, W, 3), as previews/step-NNNNNNN.png of a run, all of it or nothing."""
    folder = run_dir / PREVIEWS_DIRECTORY
    path = folder / f"step-{step:07d}.png"
    with naming_failures(path):
        folder.mkdir(exist_ok=True)
    with naming_failures(path), written_aside(path) as file:
        Image.fromarray(image).save(file, format="png")
    return path
