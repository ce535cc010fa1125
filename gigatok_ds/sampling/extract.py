"""Images to code shards: what a GPT is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gigatok_ds.cluster.launched import ALONE, LaunchedRank
from gigatok_ds.data.codes import CodeSample, new_metadata
from gigatok_ds.data.loader import BatchLoader, image_name
from gigatok_ds.data.prefetch import on_device
from gigatok_ds.data.transforms import decode_image, pixels_of, scale_pixels
from gigatok_ds.errors import InputError
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.packing.code_directory import CodeDirectory
from gigatok_ds.precision import float32_arithmetic
from gigatok_ds.sampling.augmented_views import Views
from gigatok_ds.sampling.read_later import read_later
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.remote import open_shards, short_name


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How codes are extracted: `batch_size` in views, `workers` processes that decode images, `tf32` of
    `precision.float32_arithmetic`.
    """

    batch_size: int = 32
    samples_per_shard: int = 10_000
    workers: int = 0
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch size is {self.batch_size}; it must be at least 1")


def extract_codes(tokenizer: Tokenizer, shards: str | Path, out: str | Path, *, views: Views, provenance: dict,
                  extraction: Extraction = Extraction(), rank: LaunchedRank = ALONE) -> None:
    """Encode every view of every image of `shards`, a directory or a URL, once into code shards (views, T).

    They have the images' keys, labels and captions. Every rank writes the shards whose turn is its own and keeps those
    that are whole: run it again after an interruption, with any number of ranks, and the files end up the same. Batches
    are of `batch_size` views, whole images and at least one, counted from the beginning of each shard: what a batch
    holds may change the last bits of a latent and, rarely, a code. So batch size, device and `tf32` belong to the
    settings that must not change on the way; the number of `workers` may. `provenance` says which tokenizer it is, see
    `checkpoint.standalone.identify`. Raises InputError for an image that cannot be decoded (leaving it out would
    renumber the others), one whose latents are not finite, and what `CodeDirectory.fill` raises.
    """
    index, config = open_shards(shards), tokenizer.config
    device = tokenizer.quant_conv.weight.device
    settings = views.describe() | {
        "shards": short_name(shards), "shards_sha256": index.identity(),
        "samples_per_shard": extraction.samples_per_shard, "batch_size": extraction.batch_size, "device": device.type,
        "tf32": extraction.tf32,
    }
    metadata = new_metadata(
        codebook_size=config.quantizer.codebook_size, latent_tokens=config.latent_tokens, augmentations=views.count,
        count=len(index), provenance=provenance | settings)
    images = max(1, extraction.batch_size // views.count)

    def make_samples(ranges: list[range]) -> Iterator[CodeSample]:
        batches = [numbers[start : start + images] for numbers in ranges for start in range(0, len(numbers), images)]
        loader = BatchLoader(_ImageViews(index, views), batches, workers=extraction.workers,
                             pin_memory=device.type == "cuda")
        for numbers, codes in read_later(_encoded(tokenizer, on_device(loader, ("pixels",), device))):
            for i, rows in zip(numbers.tolist(), codes.numpy(), strict=True):
                if rows.min() < 0:
                    raise InputError(
                        f"latents of sample {index.key(i)!r} hold nan or inf; check the tokenizer's weights"
                    )
                yield CodeSample(key=index.key(i), codes=rows, label=index.label(i), caption=index.caption(i))

    if not tokenizer.quantizer.codebook().isfinite().all():
        raise InputError("the tokenizer's codebook holds nan or inf; its weights are damaged")
    with float32_arithmetic(tf32=extraction.tf32):
        CodeDirectory(directory=Path(out), metadata=metadata, key=index.key, classes=index.classes,
                      samples_per_shard=extraction.samples_per_shard).fill(rank, make_samples)


@torch.no_grad()
def _encoded(tokenizer: Tokenizer, batches: Iterable[dict[str, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers (B,) and codes (B, views, T) of each batch, which nothing waits for."""
    for batch in batches:
        pixels = batch["pixels"]
        codes = tokenizer.quantizer.codes(tokenizer.latent(scale_pixels(pixels).flatten(0, 1)))
        yield batch["sample"], codes.unflatten(0, pixels.shape[:2])


class _ImageViews(Dataset):
    """The views of image number i: bytes (views, 3, S, S), a quarter of what floats would take between processes."""

    def __init__(self, index: ShardIndex, views: Views):
        self.index, self.views = index, views

    def __getitem__(self, i: int) -> dict:
        image = decode_image(self.index.read(i), image_name(self.index, i), orient=self.views.orient)
        return {"pixels": torch.stack([pixels_of(view) for view in self.views(image, i)]), "sample": i}
