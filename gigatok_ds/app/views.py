"""What the page shows of models, as arrays: pure functions of models, images and codes.

Pictures are uint8 (height, width, 3), codes int64 (T,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import index

import numpy as np
import torch
from PIL import Image

from gigatok_ds.data.transforms import center_crop, to_tensor
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.image_metrics import make_grid, psnr, to_uint8
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.sampling.images import decode_images, sample_images

DIFFERENCE_GAIN = 4
STRIP_COLUMNS, CELL = 32, 20
MAX_SAMPLES = 64  # drawn at a time
MAX_GUIDANCE = 20.0
MAX_TEMPERATURE = 5.0
MAX_SEED = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """An image as the tokenizer takes it, (S, S, 3); its codes, what they decode to, and the PSNR of that in dB."""

    picture: np.ndarray
    codes: np.ndarray
    reconstruction: np.ndarray
    psnr: float


@torch.no_grad()
def encoded(tokenizer: Tokenizer, image: Image.Image) -> Encoded:
    """Cut the centre out of an RGB image, as in validation, encode and decode it."""
    crop = center_crop(image, tokenizer.config.image_size)
    pixels = to_tensor(crop)[None]
    codes = tokenizer.encode(pixels)
    restored = decode_images(tokenizer, codes, 1)
    return Encoded(picture=np.asarray(crop), codes=codes[0].cpu().numpy(), reconstruction=_picture(restored[0]),
                   psnr=float(psnr(pixels, restored)[0]))


@torch.no_grad()
def decoded(tokenizer: Tokenizer, codes: np.ndarray) -> np.ndarray:
    """The picture (S, S, 3) of codes (T,). Raises InputError when they are not codes of this tokenizer."""
    tensor = torch.from_numpy(codes)[None].to(tokenizer.quant_conv.weight.device)
    return _picture(decode_images(tokenizer, tensor, 1)[0])


def neutral_codes(tokenizer: Tokenizer) -> np.ndarray:
    """The codes of an image of grey level 128 all over: what stands for codes that are left out."""
    size = tokenizer.config.image_size
    return encoded(tokenizer, Image.new("RGB", (size, size), (128, 128, 128))).codes


def difference(picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Absolute differences of two pictures, DIFFERENCE_GAIN times as bright: black where they are the same."""
    distance = np.abs(picture.astype(np.int16) - other.astype(np.int16))
    return np.minimum(distance * DIFFERENCE_GAIN, 255).astype(np.uint8)


def keep_first(codes: np.ndarray, count: int, filler: np.ndarray) -> np.ndarray:
    """The first `count` codes, and from there on those of `filler` (T,). Raises InputError unless 0 <= count <= T."""
    _check_position("the number of codes to keep", count, len(codes))
    return np.concatenate([codes[:count], filler[count:]])


def swapped(codes: np.ndarray, others: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Both with the codes at positions first, ..., last - 1 exchanged. Raises InputError unless 0 <= first <= last <=
    T.
    """
    _check_position("the end of the exchanged codes", last, len(codes))
    if not 0 <= first <= last:
        raise InputError(
            f"the exchanged codes begin at {first} and end before {last}; choose a beginning from 0 to the end"
        )
    inside = np.zeros(len(codes), dtype=bool)
    inside[first:last] = True
    return np.where(inside, others, codes), np.where(inside, codes, others)


def code_colours(tokenizer: Tokenizer) -> np.ndarray:
    """A colour for each code, uint8 (K, 3): close codes have similar colours.

    They are the first three principal components of the codebook, each stretched over the range of brightness.
    """
    codebook = tokenizer.quantizer.codebook().detach().double().cpu()
    centred = codebook - codebook.mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)  # in ascending order of variance
    directions = directions.flip(1)[:, :3]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    components = centred @ (directions * largest.sign())  # an eigenvector's sign is arbitrary
    low, high = components.min(0).values, components.max(0).values
    colours = np.full((len(codebook), 3), 128, dtype=np.uint8)  # of codebooks with fewer than three dimensions
    colours[:, : components.shape[1]] = (30 + 210 * (components - low) / (high - low).clamp_min(1e-12)).numpy()
    return colours


def strip(codes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Codes in their order as squares of their colours, STRIP_COLUMNS to a row; what is left of the last row is white.
    """
    columns = min(STRIP_COLUMNS, len(codes))
    cells = np.full((math.ceil(len(codes) / columns) * columns, 3), 255, dtype=np.uint8)
    cells[: len(codes)] = colours[codes]
    squares = torch.from_numpy(cells).view(-1, columns, 3, 1, 1).expand(-1, -1, -1, CELL, CELL)
    return make_grid(squares, gap=1)


def enlarged(picture: np.ndarray, side: int, least: int) -> np.ndarray:
    """The picture, each pixel as a square of so many that `side` of its pixels become at least `least`."""
    factor = math.ceil(least / side)
    return picture.repeat(factor, 0).repeat(factor, 1)


def samples(gpt: GPT, tokenizer: Tokenizer, classes: list[int], *, per_class: int, guidance: float, temperature: float,
            top_k: int, seed: int) -> np.ndarray:
    """A row of `per_class` pictures for each class: those of `gigatok-ds sample` with the same settings.

    Raises InputError for settings out of range, or more than MAX_SAMPLES pictures.
    """
    known = gpt.config.num_classes
    if not classes or not all(0 <= label < known for label in classes):
        raise InputError(f"the classes are {classes}; choose at least one, from 0 to {known - 1}")
    if not 1 <= per_class * len(classes) <= MAX_SAMPLES:
        raise InputError(f"{len(classes)} classes with {per_class} images each; from 1 to {MAX_SAMPLES} images are "
                         "drawn at a time")
    for name, value, low, high in (("guidance", guidance, 1, MAX_GUIDANCE),
                                   ("temperature", temperature, 0, MAX_TEMPERATURE), ("the seed", seed, 0, MAX_SEED)):
        if not low <= value <= high:
            raise InputError(f"{name} is {value}; it must be from {low} to {high:g}")
    wanted = torch.tensor(classes).repeat_interleave(per_class)
    _, images = sample_images(gpt, tokenizer, wanted, seed=index(seed), cfg_scale=guidance, temperature=temperature,
                              top_k=top_k)
    return make_grid(images.unflatten(0, (len(classes), per_class)))


def _check_position(name: str, value: int, tokens: int) -> None:
    if not 0 <= value <= tokens:
        raise InputError(f"{name} is {value}; it must be from 0 to {tokens}")


def _picture(image: torch.Tensor) -> np.ndarray:
    return to_uint8(image).permute(1, 2, 0).contiguous().numpy()
