"""How well a tokenizer in training restores the validation images, which all ranks share out among themselves."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gigatok_ds.config.recipe import TokenizerRecipe
from gigatok_ds.data.loader import evaluation_batches
from gigatok_ds.data.prefetch import on_device
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.code_metrics import entropy_of_counts, usage_of_counts
from gigatok_ds.evaluation.distribution import FeatureStatistics, frechet_distance
from gigatok_ds.evaluation.generation import short_count
from gigatok_ds.evaluation.image_metrics import psnr
from gigatok_ds.evaluation.inception import FEATURES, load_inception, origin_of
from gigatok_ds.losses.perceptual import LPIPS
from gigatok_ds.models.frozen.pretrained_files import RANDOM
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.shards.index import ShardIndex

logger = logging.getLogger(__name__)


class TokenizerValidation:
    """Figures on the validation images, center-cropped; every image counts once, in memory that does not grow."""

    def __init__(self, recipe: TokenizerRecipe, index: ShardIndex, perceptual: nn.Module | None, topology: Topology,
                 batch_size: int):
        """perceptual: the network of the perceptual loss; batch_size: how many images a rank takes at a time.

        Raises InputError when there are fewer images than wanted, or the Inception weights cannot be had.
        """
        self.recipe, self.index, self.topology, self.batch_size = recipe, index, topology, batch_size
        config = recipe.validation
        self.images = len(index) if config.images is None else config.images
        if self.images > len(index):
            raise InputError(f"validation.images is {self.images}, but {index.location} holds {len(index)}; "
                             "lower it, or set it to null for all")
        self.lpips = perceptual if config.perceptual and isinstance(perceptual, LPIPS) else None
        self.fid = ReconstructionFID(config.inception, self.images, topology) if config.inception is not None else None

    @torch.no_grad()
    def measure(self, network: nn.Module, step: int) -> dict[str, float]:
        """Means over images, how the codebook serves them and, when it is its turn, rFID; collective.

        `network` is left in evaluation mode. Raises InputError when latents are not finite.
        """
        network.eval()
        topology, fid = self.topology, self.fid if self._fid_is_due(step) else None
        names = ["psnr", "lpips"] if self.lpips else ["psnr"]
        sums = torch.zeros(len(names), dtype=torch.float64, device=topology.device)
        codebook_size = self.recipe.model.quantizer.codebook_size
        counts = torch.zeros(codebook_size + 1, dtype=torch.int64, device=topology.device)
        for batch in self._batches():
            pixels, count = batch["images"], int(batch["valid"].sum())
            output = network(pixels)
            if not count:
                continue
            images, restored = pixels[:count], output.reconstruction.float()[:count]
            distances = [psnr(images, restored), *([_lpips_of(self.lpips, images, restored)] if self.lpips else [])]
            sums += torch.stack([values.double().sum() for values in distances])
            codes = topology.own_images(output.codes)[:count]
            counts += torch.bincount(codes.flatten() + 1, minlength=len(counts))  # -1, no code, counts as the first
            if fid:
                fid.add(images, restored)
        means = topology.sum_over_ranks(sums) / self.images
        figures = dict(zip(names, means.tolist(), strict=True)) | _codebook_figures(topology.sum_over_ranks(counts))
        return figures | fid.figure() if fid else figures

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """This rank's images, decoded by processes of their own as those of training are, the next ones on their way
        already.
        """
        device = self.topology.device
        batches = evaluation_batches(self.index, self.recipe.model.image_size, self.batch_size,
                                     self.topology.image_share, images=self.images, as_bytes=True,
                                     orient=self.recipe.data.orient, workers=self.recipe.data.workers,
                                     pin_memory=device.type == "cuda")
        return on_device(batches, ("images",), device)

    def _fid_is_due(self, step: int) -> bool:
        every = self.recipe.validation.fid_every
        return every is None or step % every == 0 or step == self.recipe.training.steps


class SeveralValidations:
    """The figures of the first set of images under their own names, those of others as FIGURE.NAME."""

    def __init__(self, validations: dict[str, TokenizerValidation]):
        self.validations = validations

    def measure(self, network: nn.Module, step: int) -> dict[str, float]:
        """As TokenizerValidation's, of all."""
        figures: dict[str, float] = {}
        for number, (name, validation) in enumerate(self.validations.items()):
            figures |= {f"{figure}.{name}" if number else figure: value
                        for figure, value in validation.measure(network, step).items()}
        return figures


def _lpips_of(lpips: LPIPS, images: Tensor, restored: Tensor) -> Tensor:
    """(B,), without the dropout that the loss may have."""
    training = lpips.training
    distances = lpips.eval()(images, restored)
    lpips.train(training)
    return distances


def _codebook_figures(counts: Tensor) -> dict[str, float]:
    """counts (K + 1,): how many latents got no code because they are not finite, and how many got each code."""
    if counts[0]:
        raise InputError(f"{int(counts[0])} latents of the validation images are not finite; lower optimizer.lr, or "
                         "continue from the last checkpoint with training.precision=fp32 to find the cause")
    return {
        "codebook_usage": usage_of_counts(counts[1:]),
        "codebook_perplexity": math.exp(entropy_of_counts(counts[1:])),
    }


class ReconstructionFID:
    """Frechet distance between the Inception features of images and of their reconstructions, over all ranks."""

    def __init__(self, weights: str, images: int, topology: Topology):
        """weights: a path, or `random`; images: how many there are on all ranks."""
        if topology.is_first:
            logger.info("%s", origin_of(weights, "validation.inception"))
        self.topology, self.name = topology, fid_name(images, weights)
        self.inception = load_inception(weights, "validation.inception").to(topology.device)
        self._whole_real: FeatureStatistics | None = None  # of the images of all ranks, the same at every validation
        self._start()

    def _start(self) -> None:
        self._real, self._restored = (FeatureStatistics(FEATURES, self.topology.device) for _ in range(2))

    def add(self, images: Tensor, restored: Tensor) -> None:
        """Take in some of this rank's images and their reconstructions, (B, 3, H, W) floats in [-1, 1]."""
        self._restored.update(self.inception(restored))
        if self._whole_real is None:
            self._real.update(self.inception(images))

    def figure(self) -> dict[str, float]:
        """The distance, by name, of what was added since the last call; collective."""
        if self._whole_real is None:
            self._whole_real = self._real.over_ranks(self.topology.sum_over_ranks)
        restored = self._restored.over_ranks(self.topology.sum_over_ranks)
        self._start()
        sides = self._whole_real.gaussian(), restored.gaussian()
        return {self.name: self.topology.from_first(frechet_distance(*sides) if self.topology.is_first else None)}


def fid_name(images: int, weights: str) -> str:
    """What an rFID of so many validation images is called: `rfid_val50k`, `rfid_val1234`.

    The fewer the images the larger the distance, so those of different numbers do not compare. Those of random weights
    compare with nothing.
    """
    return f"rfid_val{short_count(images)}" + ("_random" if weights == RANDOM else "")
