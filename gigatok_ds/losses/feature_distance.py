"""Perceptual distances other than LPIPS: mean squared difference of DINOv2's patch tokens, or of ResNet-50's logits."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.losses.perceptual import SETTING, PerceptualDistance
from gigatok_ds.models.discriminators.dino import IMAGENET_MEAN, IMAGENET_STD
from gigatok_ds.models.frozen.frozen_vit import FrozenViT, vit_file
from gigatok_ds.models.frozen.pretrained import autocast, build_frozen
from gigatok_ds.models.frozen.pretrained_files import WeightFile
from gigatok_ds.models.layout import laid_out

RESNET_URL = "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"
RESNET_SIZE = 224
DINO_GRID = 16  # of patches of 14 pixels: images at 224


class FeatureDistance(PerceptualDistance):
    """Mean squared difference of a frozen network's outputs, which it computes in the training's precision."""

    def __init__(self, network: nn.Module, *, precision: str = "fp32"):
        """network: images (B, 3, H, W) in [-1, 1] to features (B, ...); it must not depend on training mode."""
        super().__init__()
        self.network = network
        self.precision = precision
        self.requires_grad_(False)

    @torch.no_grad()
    def look(self, images: Tensor) -> list[Tensor]:
        return [self._features(images)]

    def distance(self, seen: list[Tensor], reconstruction: Tensor) -> Tensor:
        (theirs,) = seen
        return (self._features(reconstruction) - theirs).square().flatten(1).mean(1)

    def _features(self, images: Tensor) -> Tensor:
        with autocast(images.device, self.precision):
            return self.network(images).float()


class ResNetLogits(nn.Module):
    """torchvision's ResNet-50 on images in [-1, 1], resized to 224 (bilinear, antialiased) and normalised.

    Always in evaluation mode; GigaTok leaves it in training mode, where each batch changes its batch norm's statistics.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, file: WeightFile):
        super().__init__()
        from torchvision.models import resnet50

        self.network = build_frozen(resnet50, file)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> ResNetLogits:
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1000)."""
        images = F.interpolate(images.float(), size=(RESNET_SIZE, RESNET_SIZE), mode="bilinear", antialias=True)
        return self.network(laid_out(((images + 1) / 2 - self.mean) / self.std))


def dinov2_file(weights: str | Path | None) -> WeightFile:
    return vit_file("dinov2-vit-s", weights, asked_by="loss.perceptual.model", setting=SETTING)


def resnet_file(weights: str | Path | None) -> WeightFile:
    name = RESNET_URL.rpartition("/")[2]
    return WeightFile(setting=SETTING, value=weights, names=(name,), url=RESNET_URL,
                      what=f"torchvision's ResNet50_Weights.IMAGENET1K_V2, {name}")


def load_feature_distance(model: str, weights: str | Path | None = None, *, precision: str = "fp32") -> FeatureDistance:
    """The distance for a `loss.perceptual.model` other than vgg. Raises InputError when the weights are missing."""
    network: nn.Module
    if model == "resnet50":
        network = ResNetLogits(resnet_file(weights))
    else:
        network = FrozenViT("dinov2-vit-s", dinov2_file(weights), setting="loss.perceptual.model", grid=DINO_GRID)
    return FeatureDistance(network, precision=precision)
