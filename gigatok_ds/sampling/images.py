"""Classes to images: a GPT draws codes, a tokenizer decodes them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from gigatok_ds.checkpoint.standalone import load_gpt, load_tokenizer
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.image_metrics import make_grid
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.sampling.generate import generate
from gigatok_ds.streams import torch_stream


def check_pair(gpt: GPT, tokenizer: Tokenizer) -> None:
    """InputError unless the GPT speaks this tokenizer's codes."""
    ours = (gpt.config.vocab_size, gpt.config.sequence_length)
    theirs = (tokenizer.config.quantizer.codebook_size, tokenizer.config.latent_tokens)
    if ours != theirs:
        raise InputError(f"the GPT has (codebook size, latent tokens) {ours}, the tokenizer {theirs}: they do not match")


def sample_images(gpt: GPT, tokenizer: Tokenizer, classes: Tensor, *, seed: int = 0, batch_size: int = 32,
                  **sampling) -> tuple[Tensor, Tensor]:
    """Codes (B, T) and images (B, 3, S, S), not clamped, for classes (B,); `sampling` goes to `generate`."""
    check_pair(gpt, tokenizer)
    codes, images = [], []
    for start in tqdm(range(0, len(classes), batch_size), desc="sample", unit="batch"):
        generator = torch_stream(seed, "sampling", start, device=gpt.norm.weight.device.type)
        chosen = generate(gpt, classes[start : start + batch_size], generator=generator, **sampling)
        codes.append(chosen.cpu())
        images.append(tokenizer.decode(chosen).float().cpu())
    return torch.cat(codes), torch.cat(images)


def sample_grid(gpt_path: Path, tokenizer_path: Path, classes: list[int], out: Path, *, per_class: int, seed: int,
                device: str, **sampling) -> None:
    """Write a PNG with one row of `per_class` images for each class."""
    if per_class < 1:
        raise InputError(f"per_class is {per_class}; it must be at least 1")
    gpt, tokenizer = load_gpt(gpt_path, device=device), load_tokenizer(tokenizer_path, device=device)
    wanted = torch.tensor(classes).repeat_interleave(per_class)
    _, images = sample_images(gpt, tokenizer, wanted, seed=seed, **sampling)
    grid = make_grid(images.unflatten(0, (len(classes), per_class)))
    scratch = out.with_name(f".{out.name}.partial.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(scratch)
    os.replace(scratch, out)
