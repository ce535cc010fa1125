"""How well a standalone tokenizer restores images: PSNR, SSIM, LPIPS, rFID, and how its codebook serves them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gigatok_ds.data.transforms import scale_pixels
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.code_metrics import entropy_of_counts, usage_of_counts
from gigatok_ds.evaluation.cropped import CroppedImages
from gigatok_ds.evaluation.distribution import FeatureStatistics, frechet_distance
from gigatok_ds.evaluation.generation import short_count
from gigatok_ds.evaluation.image_metrics import psnr, ssim
from gigatok_ds.evaluation.inception import FEATURES, SPATIAL_FEATURES, InceptionFeatures
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.parallel.topology import Topology

VALIDATION_IMAGES = 50_000


@dataclass(frozen=True, kw_only=True)
class ReconstructionResult:
    """figures by name; each image's values (N,) float64 by metric, in the order of the set."""

    figures: dict[str, float]
    values: dict[str, Tensor]


@torch.no_grad()
def evaluate_reconstruction(tokenizer: Tokenizer, images: CroppedImages, topology: Topology, *,
                            inception: InceptionFeatures | None = None, lpips: nn.Module | None = None,
                            suffix: str = "", batch_size: int = 32, workers: int = 0) -> ReconstructionResult:
    """Encode every image to codes and decode those, in the tokenizer's own dtype; collective, every image counts once.

    Means are over images. LPIPS compares the decoder's unclamped output, everything else what a file of 8 bits would
    hold. Frechet distances (rFID, and sFID's features) are between the images and their reconstructions. suffix:
    appended to the distances' names.
    """
    count = len(images)
    if inception is not None and count < 2:
        raise InputError(f"a Frechet distance needs at least 2 images, but there are {count}")
    values = {name: torch.zeros(count, dtype=torch.float64, device=topology.device)
              for name in ("psnr", "ssim", *(["lpips"] if lpips else []))}
    codes = torch.zeros(tokenizer.config.quantizer.codebook_size, dtype=torch.int64, device=topology.device)
    distances = Distances(inception, topology) if inception is not None else None
    loader = images.batches(topology, batch_size, workers=workers)
    for batch in tqdm(loader, desc="reconstruct", unit="batch", disable=None if topology.is_first else True):
        rows, real = batch["number"].to(topology.device), scale_pixels(batch["pixels"].to(topology.device))
        chosen = tokenizer.encode(real)
        if int(chosen.min()) < 0:
            raise InputError("some latents are not finite: the tokenizer's weights or its dtype are not fit for use")
        restored = tokenizer.decode(chosen).float()
        codes += torch.bincount(chosen.flatten(), minlength=len(codes))
        values["psnr"][rows], values["ssim"][rows] = psnr(real, restored), ssim(real, restored)
        if lpips:
            values["lpips"][rows] = lpips(real, restored).double()
        if distances:
            distances.add(real, restored)
    values = {name: topology.sum_over_ranks(found) for name, found in values.items()}
    codes = topology.sum_over_ranks(codes)
    figures = {name: float(found.mean()) for name, found in values.items()} | {
        "codebook_usage": usage_of_counts(codes), "codebook_perplexity": math.exp(entropy_of_counts(codes))}
    if distances:
        figures |= {f"{name}_val{short_count(count)}{suffix}": value for name, value in distances.figures().items()}
    return ReconstructionResult(figures=figures, values=values)


class Distances:
    """Frechet distances between two streams of images, in memory that does not grow with their number."""

    def __init__(self, inception: InceptionFeatures, topology: Topology):
        self.inception, self.topology = inception, topology
        self._sides = [[FeatureStatistics(width, topology.device) for width in (FEATURES, SPATIAL_FEATURES)]
                       for _ in range(2)]

    def add(self, real: Tensor, restored: Tensor) -> None:
        """(B, 3, H, W) floats in [-1, 1] each."""
        for images, statistics in zip((real, restored), self._sides, strict=True):
            output = self.inception.outputs(images)
            for features, found in zip((output.pooled, output.spatial), statistics, strict=True):
                found.update(features)

    def figures(self) -> dict[str, float]:
        """`rfid` and `rsfid`, of all ranks' images; collective."""
        full = [[found.over_ranks(self.topology.sum_over_ranks) for found in statistics] for statistics in self._sides]
        figures = None
        if self.topology.is_first:
            pairs = [(ours.gaussian(), theirs.gaussian()) for ours, theirs in zip(*full, strict=True)]
            figures = dict(zip(("rfid", "rsfid"), (frechet_distance(*pair) for pair in pairs), strict=True))
        return self.topology.from_first(figures)


@torch.no_grad()
def best_median_worst(tokenizer: Tokenizer, images: CroppedImages, values: Tensor, *, lower_is_better: bool,
                      each: int = 8) -> tuple[Tensor, list[list[int]]]:
    """Images and reconstructions of three kinds, (3 x 2, n, 3, S, S) on the CPU, and the n numbers of each kind.

    Rows: the best images, their reconstructions, the middle ones, ..., the worst ones. n is `each`, or fewer.
    """
    order = values.argsort(descending=not lower_is_better, stable=True).tolist()
    each = min(each, len(order))
    middle = (len(order) - each) // 2
    chosen = [order[:each], order[middle : middle + each], order[len(order) - each :]]
    device, rows = tokenizer.quant_conv.weight.device, []
    for numbers in chosen:
        real = scale_pixels(images.pixels(numbers))
        rows += [real, tokenizer.decode(tokenizer.encode(real.to(device))).float().cpu()]
    return torch.stack(rows), chosen
