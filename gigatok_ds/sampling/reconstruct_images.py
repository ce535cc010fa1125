"""Reconstruct a directory of images."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from gigatok_ds.data.folder import scan_image_folder
from gigatok_ds.data.transforms import center_window, decode_image, to_tensor
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.image_metrics import psnr, to_uint8
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.sampling.images import check_png, write_png


@torch.no_grad()
def reconstruct_folder(tokenizer: Tokenizer, images: Path, out: Path) -> tuple[int, float]:
    """Write a PNG reconstruction of every image below `images`, as a viewer shows it, to the same place below `out`.

    Returns how many, and their mean PSNR in dB. Raises InputError when there are no images, one cannot be read, or
    something that was not written by this program would be replaced.
    """
    paths = scan_image_folder(images, mixed=True).paths
    targets = [(out / path.relative_to(images)).with_suffix(".png") for path in paths]
    for target in targets:
        check_png(target)
    if len(set(targets)) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        raise InputError(
            f"several images below {images} would become {twice}; give them names that differ before the suffix"
        )
    values = []
    for path, target in tqdm(zip(paths, targets, strict=True), total=len(paths), desc="reconstruct", unit="image"):
        crop = center_window(decode_image(path.read_bytes(), str(path), orient=True), *tokenizer.image_shape)
        pixels = to_tensor(crop)[None]
        restored = tokenizer.decode(tokenizer.encode(pixels)).float().cpu()
        values.append(psnr(pixels, restored))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_png(to_uint8(restored)[0].permute(1, 2, 0).numpy(), target)
    return len(paths), float(torch.cat(values).mean())
