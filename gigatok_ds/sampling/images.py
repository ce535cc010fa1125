"""Classes to images: a GPT draws codes, a tokenizer decodes them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.image_metrics import make_grid
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.sampling.generate import Sampler

_SOFTWARE = "gigatok-ds"  # in each PNG that is written


DECODED = 32  # images at a time, on a GPU


def check_pair(gpt: GPT, tokenizer: Tokenizer) -> None:
    """InputError unless the GPT speaks this tokenizer's codes."""
    ours = (gpt.config.vocab_size, gpt.config.sequence_length)
    theirs = (tokenizer.config.quantizer.codebook_size, tokenizer.config.latent_tokens)
    if ours != theirs:
        raise InputError(
            f"the GPT has (codebook size, latent tokens) {ours}, the tokenizer {theirs}: they do not match"
        )


def sample_images(gpt: GPT, tokenizer: Tokenizer, classes: Tensor, *, seed: int = 0, batch_size: int = 32,
                  compile: bool = False, **sampling) -> tuple[Tensor, Tensor]:
    """Codes (B, T) and images (B, 3, S, S), not clamped, for classes (B,) as images number 0 to B - 1 of `seed`;
    `sampling` goes to `Sampler.codes`."""
    check_pair(gpt, tokenizer)
    gpt.check_classes(classes)
    sampler = Sampler(gpt, batch_size, compile=compile)
    codes, images = [], []
    for start in tqdm(range(0, len(classes), batch_size), desc="sample", unit="batch"):
        batch = classes[start : start + batch_size]
        chosen = sampler.codes(batch, range(start, start + len(batch)), seed=seed, **sampling)
        codes.append(chosen.cpu())
        images.append(decode_images(tokenizer, chosen, batch_size))
    return torch.cat(codes), torch.cat(images)


def decode_images(tokenizer: Tokenizer, codes: Tensor, batch_size: int) -> Tensor:
    """Images (B, 3, S, S), float32 on the CPU, not clamped, of codes (B, T) with B at most `batch_size`.

    Sums depend on the shape in the last bits, so it is always the same: one image by one on a CPU, which is no slower,
    elsewhere batches filled up to `batch_size`, or to DECODED of them, since feature maps take more memory than codes.
    """
    if codes.device.type == "cpu":
        return torch.cat([tokenizer.decode(one).float() for one in codes.split(1)])
    size, images = min(batch_size, DECODED), []
    for part in codes.split(size):
        filled = torch.cat([part, part[-1:].expand(size - len(part), -1)])
        images.append(tokenizer.decode(filled)[: len(part)].float())
    return torch.cat(images).cpu()


def sample_grid(gpt: GPT, tokenizer: Tokenizer, classes: list[int], out: Path | None, *, per_class: int,
                **sampling) -> None:
    """Write a PNG with one row of `per_class` images for each class; `sampling` goes to `sample_images`.

    out is None on tensor ranks that only help.
    """
    check_per_class(per_class)
    if out is not None:
        check_png(out)
    wanted = torch.tensor(classes).repeat_interleave(per_class)
    _, images = sample_images(gpt, tokenizer, wanted, **sampling)
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_png(make_grid(images.unflatten(0, (len(classes), per_class))), out)


def check_per_class(per_class: int) -> None:
    if per_class < 1:
        raise InputError(f"per_class is {per_class}; it must be at least 1")


def write_png(pixels: np.ndarray, path: Path) -> None:
    """Write uint8 (height, width, 3), complete or not at all; the file says who wrote it."""
    said = PngInfo()
    said.add_text("Software", _SOFTWARE)
    scratch = path.with_name(f".{path.name}.partial")
    Image.fromarray(pixels).save(scratch, format="PNG", pnginfo=said)
    os.replace(scratch, path)


def check_png(path: Path) -> None:
    """InputError when there is something at `path` that `write_png` has not written."""
    if not os.path.lexists(path):
        return
    unreadable = suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError)
    with unreadable, Image.open(path, formats=["PNG"]) as image:
        if image.info.get("Software") == _SOFTWARE:
            return
    raise InputError(f"{path} is there and is no PNG that this program has written, so it is left alone; choose "
                     "another --out or remove it")
