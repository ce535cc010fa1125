"""LPIPS: distance of two images in VGG16's features, weighted by human judgement (Zhang et al. 2018)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from gigatok_ds.errors import InputError
from gigatok_ds.models.pretrained import fill_frozen, read_frozen_weights

SETTING = "loss.perceptual.weights"
VGG_FILE = "vgg16-397923af.pth"
# The last layer of each of VGG16's five stages, and its channels.
READOUTS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}


class LPIPS(nn.Module):
    """Frozen; images are (B, 3, H, W) in [-1, 1] with sides of 16 or more; the gradient flows to them."""

    def __init__(self, features: nn.Sequential, heads: dict[str, Tensor], *, dropout: bool = False):
        """features: VGG16's first 30 layers; heads: the `lin{0..4}.model.1.weight` of the lpips package.

        `dropout` drops half of the values in front of the heads while training, which the original does by an
        oversight; it draws from torch's own generator.
        """
        super().__init__()
        self.features = features
        self.scaling_layer = _Scaling()
        for index, channels in enumerate(READOUTS.values()):
            self.add_module(f"lin{index}", _Head(channels, dropout))
        rest = {name: value for name, value in self.state_dict().items() if name not in heads}
        fill_frozen(self, rest | heads, "the lpips package")
        self.requires_grad_(False)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """One distance per pair of images, (B,) float32."""
        total = images.new_zeros(len(images), dtype=torch.float32)
        stages = zip(self._stages(images), self._stages(reconstruction))
        for index, (ours, theirs) in enumerate(stages):
            difference = (_unit_channels(ours) - _unit_channels(theirs)).square()
            total = total + self.get_submodule(f"lin{index}")(difference).mean(dim=(1, 2, 3))
        return total

    def _stages(self, images: Tensor) -> Iterator[Tensor]:
        x = self.scaling_layer(images.float())
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in READOUTS:
                yield x


class _Scaling(nn.Module):
    """From [-1, 1] to roughly ImageNet's normalisation, with LPIPS's own constants."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.shift) / self.scale


class _Head(nn.Module):
    def __init__(self, channels: int, dropout: bool):
        super().__init__()
        self.model = nn.Sequential(
            nn.Dropout(0.5) if dropout else nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False)
        )

    def forward(self, difference: Tensor) -> Tensor:
        return self.model(difference)


def _unit_channels(feature: Tensor) -> Tensor:
    # vector_norm, because the gradient of sqrt(sum(x^2)) is NaN where all channels are zero.
    return feature / (torch.linalg.vector_norm(feature, dim=1, keepdim=True) + 1e-10)


def load_lpips(weights: str | Path | None = None, *, dropout: bool = False) -> LPIPS:
    """LPIPS with torchvision's VGG16 from `weights` (None: torch's cache) and the lpips package's heads.

    Raises InputError when either is missing.
    """
    path = vgg_cache() if weights is None else Path(weights)
    what = f"torchvision's VGG16_Weights.IMAGENET1K_V1, {VGG_FILE}"
    if not path.is_file():
        raise InputError(f"LPIPS needs {what}: there is no file {path}; download it there, "
                         f"or give its path as {SETTING}")
    state = read_frozen_weights(path, SETTING, what)
    from torchvision.models import vgg16

    with torch.device("meta"):
        features = vgg16().features[: max(READOUTS) + 1]
    wanted = {f"features.{name}": name for name in features.state_dict()}
    fill_frozen(features, {wanted[name]: value for name, value in state.items() if name in wanted},
                f"{SETTING}: {path}")
    return LPIPS(features, _published_heads(), dropout=dropout)


def vgg_cache() -> Path:
    """Where torch and torchvision keep the downloaded VGG16."""
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE


def _published_heads() -> dict[str, Tensor]:
    # Found without importing the package, which would load much more than a file of 7 kB.
    spec = importlib.util.find_spec("lpips")
    if spec is None:
        raise InputError("LPIPS needs the package lpips for its weights; pip install lpips")
    path = Path(spec.submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth"
    return read_frozen_weights(path, "lpips", "the weights in the package lpips; reinstall it")
