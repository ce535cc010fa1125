"""Reconstruct a directory of images."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from gigatok_ds.data.folder import scan_image_folder
from gigatok_ds.data.transforms import center_crop, decode_image, to_tensor
from gigatok_ds.evaluation.image_metrics import psnr, to_uint8
from gigatok_ds.models.tokenizer import Tokenizer


@torch.no_grad()
def reconstruct_folder(tokenizer: Tokenizer, images: Path, out: Path) -> tuple[int, float]:
    """Write a PNG reconstruction of every image below `images` to the same place below `out`.

    Returns how many, and their mean PSNR in dB. Raises InputError when there are no images or one cannot be read.
    """
    paths = scan_image_folder(images).paths
    values = []
    for path in tqdm(paths, desc="reconstruct", unit="image"):
        crop = center_crop(decode_image(path.read_bytes(), str(path)), tokenizer.config.image_size)
        pixels = to_tensor(crop)[None]
        restored = tokenizer.decode(tokenizer.encode(pixels)).float().cpu()
        values.append(psnr(pixels, restored))
        target = (out / path.relative_to(images)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(to_uint8(restored)[0].permute(1, 2, 0).numpy()).save(target)
    return len(paths), float(torch.cat(values).mean())
