"""What a tokenizer that starts at another size makes of images before it has learnt anything there."""

from __future__ import annotations

from pathlib import Path

import torch

from gigatok_ds.checkpoint.model_sources import open_model
from gigatok_ds.checkpoint.verification import network_of
from gigatok_ds.data.transforms import scale_pixels
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.cropped import CroppedImages
from gigatok_ds.evaluation.image_metrics import psnr
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.shards.shard_cache import ShardCache

IMAGES = 8


@torch.no_grad()
def measure_start(run: Path, data: str, *, orient: bool = False, cache: ShardCache | None = None) -> tuple[int, float]:
    """How many images were looked at, IMAGES at most and evenly spaced, and the mean PSNR, in dB, of what a run's
    newest checkpoint reconstructs of them.

    Raises InputError for a run of a GPT and for data that cannot be read.
    """
    network = network_of(open_model(run))
    if not isinstance(network, Tokenizer):
        raise InputError(f"{run} is not of a tokenizer")
    images = CroppedImages(data, network.config.image_size, orient=orient, cache=cache)
    count = min(IMAGES, len(images))
    values = []
    for number in range(count):
        pixels = scale_pixels(images.pixels([number * len(images) // count]))
        values.append(psnr(pixels, network.decode(network.encode(pixels))))
    return count, float(torch.cat(values).mean())
