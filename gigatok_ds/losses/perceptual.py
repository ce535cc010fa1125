"""LPIPS: distance of two images in VGG16's features, weighted by human judgement (Zhang et al. 2018)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from gigatok_ds.errors import InputError
from gigatok_ds.models.frozen.pretrained import autocast, build_frozen, fill_frozen, read_frozen_weights
from gigatok_ds.models.frozen.pretrained_files import WeightFile
from gigatok_ds.models.layout import laid_out
from gigatok_ds.parallel.dropout import MapDropout

SETTING = "loss.perceptual.weights"
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
# The last layer of each of VGG16's five stages, and its channels.
READOUTS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}


class PerceptualDistance(nn.Module):
    """Distances between images (B, 3, H, W) in [-1, 1] in what a frozen network makes of them.

    The images are looked at once, and then any number of reconstructions is compared with that.
    """

    def look(self, images: Tensor) -> list[Tensor]:
        """What `distance` compares with; no gradient flows to the images."""
        raise NotImplementedError

    def distance(self, seen: list[Tensor], reconstruction: Tensor) -> Tensor:
        """One float32 distance per image, (B,); the gradient flows to the reconstruction."""
        raise NotImplementedError

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Both together: (B,) float32."""
        return self.distance(self.look(images), reconstruction)


class LPIPS(PerceptualDistance):
    """Frozen, for images with sides of 16 or more.

    VGG16 computes in the training's precision, what follows in float32.
    """

    def __init__(self, features: nn.Sequential, heads: dict[str, Tensor], *, dropout: bool = False,
                 precision: str = "fp32"):
        """features: VGG16's first 30 layers; heads: the `lin{0..4}.model.1.weight` of the lpips package.

        `dropout` drops half of the values in front of the heads while training, which the original does by an
        oversight.
        """
        super().__init__()
        self.precision = precision
        self.features = features
        self.scaling_layer = _Scaling()
        for index, channels in enumerate(READOUTS.values()):
            self.add_module(f"lin{index}", _Head(channels, dropout))
        rest = {name: value for name, value in self.state_dict().items() if name not in heads}
        fill_frozen(self, rest | heads, "the lpips package")
        self.requires_grad_(False)

    @torch.no_grad()
    def look(self, images: Tensor) -> list[Tensor]:
        return list(self._stages(images))

    def distance(self, seen: list[Tensor], reconstruction: Tensor) -> Tensor:
        total = reconstruction.new_zeros(len(reconstruction), dtype=torch.float32)
        for index, (theirs, ours) in enumerate(zip(seen, self._stages(reconstruction), strict=True)):
            total = total + self.get_submodule(f"lin{index}")(theirs, ours)
        return total

    def _stages(self, images: Tensor) -> Iterator[Tensor]:
        x = laid_out(self.scaling_layer(images.float()))
        for index, layer in enumerate(self.features):
            # Layer by layer, because what the caller does between two stages is not in this precision.
            with autocast(images.device, self.precision):
                x = layer(x)
            if index in READOUTS:
                yield x


class _Scaling(nn.Module):
    """Map [-1, 1] to roughly ImageNet's normalisation, with LPIPS's own constants."""

    shift: Tensor
    scale: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.shift) / self.scale


class _Head(nn.Module):
    """The distance of two maps of one stage: of each position the weighted squared difference of what is at length one.
    """

    compiles = True  # pointwise and sums over channels: a dozen passes over the largest maps, or one

    def __init__(self, channels: int, dropout: bool):
        super().__init__()
        self.model = nn.Sequential(
            MapDropout(0.5) if dropout else nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False)
        )

    def forward(self, theirs: Tensor, ours: Tensor) -> Tensor:
        """(B,) float32 of maps (B, C, H, W)."""
        dropout, readout = self.model
        difference = dropout((_unit_channels(theirs) - _unit_channels(ours)).square())
        return (difference * readout.weight).sum(1).mean((1, 2))


def _unit_channels(feature: Tensor) -> Tensor:
    feature = feature.float()
    # vector_norm, because the gradient of sqrt(sum(x^2)) is NaN where all channels are zero.
    return feature / (torch.linalg.vector_norm(feature, dim=1, keepdim=True) + 1e-10)


def load_lpips(weights: str | Path | None = None, *, dropout: bool = False, precision: str = "fp32",
               setting: str = SETTING) -> LPIPS:
    """LPIPS with torchvision's VGG16 (`weights` as in `WeightFile.value`) and the lpips package's heads.

    setting: what names the weights, for messages. Raises InputError when either is missing.
    """
    features = build_frozen(_vgg_features, vgg_file(weights, setting), _of_features)
    return LPIPS(features, read_frozen_weights(heads_file()), dropout=dropout, precision=precision)


def vgg_file(weights: str | Path | None, setting: str = SETTING) -> WeightFile:
    name = VGG_URL.rpartition("/")[2]
    return WeightFile(setting=setting, value=weights, names=(name,), url=VGG_URL,
                      what=f"torchvision's VGG16_Weights.IMAGENET1K_V1, {name}")


def heads_file() -> WeightFile:
    """The heads in the lpips package, a file of 7 kB. Raises InputError when that is not installed."""
    # Found without importing the package, which would load much more.
    spec = importlib.util.find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("LPIPS needs the package lpips for its weights; pip install lpips")
    path = Path(spec.submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth"
    return WeightFile(setting="the lpips package", value=path, names=(path.name,), what="its weights; reinstall it")


def _vgg_features() -> nn.Sequential:
    from torchvision.models.vgg import cfgs, make_layers

    features = make_layers(cfgs["D"])[: max(READOUTS) + 1]
    for layer in features:
        if isinstance(layer, nn.Conv2d):  # torch's default would let the features of random weights die away
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return features


def _of_features(state: dict[str, Tensor], features: nn.Sequential) -> dict[str, Tensor]:
    """What belongs to the first layers in torchvision's state_dict, which has a classifier."""
    wanted = {f"features.{name}": name for name in features.state_dict()}
    return {wanted[name]: value for name, value in state.items() if name in wanted}
