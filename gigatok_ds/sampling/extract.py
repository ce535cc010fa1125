"""Images to code shards: what a GPT is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from gigatok_ds.data.codes import CodeSample, write_code_shards
from gigatok_ds.data.index import ShardIndex
from gigatok_ds.data.transforms import center_crop, decode_image, random_crop, ten_crop, to_tensor
from gigatok_ds.errors import InputError
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.streams import numpy_stream

Views = Callable[[Image.Image, int], list[Image.Image]]


def views_of(kind: str, size: int, *, crop_scale: tuple[float, float] = (0.8, 1.0), seed: int = 0) -> Views:
    """What is encoded of each image: a function of the image and its number, giving crops of `size`.

    kind is "center", "flip" (the center crop and its mirror image), "ten-crop" (the original's), or "random-N": the
    center crop and N - 1 random crops with their short side at `crop_scale` of the image's.
    """
    if kind == "center":
        return lambda image, _: [center_crop(image, size)]
    if kind == "flip":
        def both(image: Image.Image, _: int) -> list[Image.Image]:
            crop = center_crop(image, size)
            return [crop, crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]

        return both
    if kind == "ten-crop":
        return lambda image, _: ten_crop(image, size)
    name, _, number = kind.partition("-")
    if name != "random" or not number.isdigit() or int(number) < 1:
        raise InputError(f"unknown crops {kind!r}; choose center, flip, ten-crop or random-N (e.g. random-8)")

    def several(image: Image.Image, sample: int) -> list[Image.Image]:
        streams = (numpy_stream(seed, "extract", sample, crop) for crop in range(1, int(number)))
        return [center_crop(image, size), *(random_crop(image, size, crop_scale, rng=rng) for rng in streams)]

    return several


def extract_codes(tokenizer: Tokenizer, shards: str | Path, out: str | Path, *, views: Views, provenance: dict,
                  batch_size: int = 64) -> None:
    """Encode every view of every image of `shards` and write code shards (views, T) with the labels to `out`.

    Nothing is left in `out` when it fails. Raises InputError when `out` is not empty.
    """
    index = ShardIndex.open(shards)
    config = tokenizer.config
    write_code_shards(
        _samples(tokenizer, index, views, batch_size),
        out,
        codebook_size=config.quantizer.codebook_size,
        latent_tokens=config.latent_tokens,
        provenance=provenance | {"shards": Path(shards).name, "images": len(index)},
        classes=index.classes,
        total=len(index),
    )


def _samples(tokenizer: Tokenizer, index: ShardIndex, views: Views, batch_size: int) -> Iterator[CodeSample]:
    for start in range(0, len(index), batch_size):
        numbers = range(start, min(start + batch_size, len(index)))
        crops = [_tensors(views(decode_image(index.read(i), index.key(i)), i)) for i in numbers]
        codes = tokenizer.encode(torch.cat(crops)).cpu().split([len(crop) for crop in crops])
        for i, rows in zip(numbers, codes):
            yield CodeSample(key=index.key(i), codes=rows.numpy(), label=index.label(i))


def _tensors(crops: list[Image.Image]) -> Tensor:
    return torch.stack([to_tensor(crop) for crop in crops])
