"""The DINO discriminator: small trained heads on a frozen ViT (Sauer et al. 2023, arXiv:2301.09515).

Parameter names and shapes are those of the original GigaTok's checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.compat import timm_library
from gigatok_ds.errors import InputError
from gigatok_ds.models.frozen.pretrained import autocast, build_frozen
from gigatok_ds.models.frozen.pretrained_files import WeightFile
from gigatok_ds.precision import NAMES
from gigatok_ds.streams import SampleDraws

if TYPE_CHECKING:
    from timm.models import VisionTransformer

BACKBONE_URL = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
INPUT_SIZE = 224
CROP_PROBABILITY = 0.5
# Tokens are read before the first block and after each of these.
READOUT_BLOCKS = (2, 5, 8, 11)
VIRTUAL_BATCH = 8
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# A random change of images (B, 3, H, W) in [-1, 1].
Augment = Callable[[Tensor, SampleDraws | None], Tensor]


class DinoDiscriminator(nn.Module):
    """One head on each of five depths of a frozen backbone; gradients pass the backbone to the image.

    The backbone belongs to the recipe, not to the training state: it is neither in parameters() nor in
    state_dict(), and its weights stay in float32 whatever the heads are cast to; it computes in the heads' type, by
    autocast, as in the original. Heads start from torch's own generator: seed it before.
    """

    lecam: nn.Module | None  # given by losses.composition.build_discriminator

    def __init__(self, backbone: VisionTransformer, *, augment: Augment | None = None):
        """backbone: one for 224 x 224 images; augment: applied in every forward pass."""
        super().__init__()
        # A tuple, because torch registers only modules.
        self._backbone = (_Backbone(backbone),)
        self.augment = augment
        self.heads = nn.ModuleList(_head(backbone.embed_dim) for _ in range(1 + len(READOUT_BLOCKS)))

    def forward(self, images: Tensor, draws: SampleDraws | None = None) -> Tensor:
        """Logits (B, 5 * 196) of images (B, 3, H, W) in [-1, 1]; high means real.

        draws decides the augmentation and the crop; without it torch's own generator does. Raises
        InputError for a batch above 8 that does not split evenly into virtual batches.
        """
        if self.augment is not None:
            images = self.augment(images, draws)
        # The image losses stay in float32 while DeepSpeed may have cast the heads.
        dtype = next(self.parameters()).dtype
        features = self.activations(fit_to_backbone(images.float(), draws), NAMES.get(dtype, "fp32"))
        logits = [head(feature.to(dtype)) for head, feature in zip(self.heads, features, strict=False)]
        return torch.cat([value.flatten(1) for value in logits], dim=1)

    def activations(self, images: Tensor, precision: str = "fp32") -> list[Tensor]:
        """The backbone's readouts of images (B, 3, 224, 224) in [-1, 1], each (B, C, 196), computed in this precision.

        A readout is the patch tokens, to each of which the class token is added.
        """
        (backbone,) = self._backbone
        if backbone.scale.device != images.device:
            backbone.to(images.device)
        # All of them before a head sees one, because heads are not to be autocast.
        with autocast(images.device, precision):
            return list(backbone(images))


class _Backbone(nn.Module):
    """The frozen transformer, and what takes images from [-1, 1] to the scale that it knows."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: VisionTransformer):
        super().__init__()
        self.network = network
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 0.5 / std)
        self.register_buffer("shift", (0.5 - mean) / std)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Iterator[Tensor]:
        patches = self.network.patch_embed(images * self.scale + self.shift)
        assert self.network.cls_token is not None and self.network.pos_embed is not None
        class_token = self.network.cls_token.expand(len(images), -1, -1)
        tokens = torch.cat([class_token, patches], dim=1) + self.network.pos_embed
        yield _readout(tokens)
        for index, block in enumerate(self.network.blocks[: READOUT_BLOCKS[-1] + 1]):
            tokens = block(tokens)
            if index in READOUT_BLOCKS:
                yield _readout(tokens)


def fit_to_backbone(images: Tensor, draws: SampleDraws | None = None) -> Tensor:
    """Images (B, 3, H, W) at 224 x 224: larger ones cropped (one place for a global batch) or averaged, at random."""
    height, width = images.shape[-2:]
    if min(height, width) <= INPUT_SIZE:
        return F.interpolate(images, size=(INPUT_SIZE, INPUT_SIZE), mode="bicubic", align_corners=False)
    coin, vertical, horizontal = draws.shared(3) if draws else torch.rand(3).tolist()
    if coin > CROP_PROBABILITY:
        return F.interpolate(images, size=(INPUT_SIZE, INPUT_SIZE), mode="area")
    top = int(vertical * (height - INPUT_SIZE + 1))
    left = int(horizontal * (width - INPUT_SIZE + 1))
    return images[..., top : top + INPUT_SIZE, left : left + INPUT_SIZE]


def _readout(tokens: Tensor) -> Tensor:
    return (tokens[:, 1:] + tokens[:, :1]).transpose(1, 2)


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(_block(width, 1), _Residual(_block(width, 9)), SpectralConv1d(width, 1, 1))


def _block(width: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(SpectralConv1d(width, width, kernel_size), BatchNormLocal(width), nn.LeakyReLU(0.2))


class _Residual(nn.Module):
    """(f(x) + x) / sqrt(2): the variance of x is kept."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return (self.fn(x) + x) * 0.5**0.5


class SpectralConv1d(nn.Module):
    """A circular 1-D convolution whose weight is divided by its largest singular value (Miyato et al. 2018).

    One power iteration per forward in training tracks the value, in float32: DeepSpeed casts parameters and
    leaves buffers in float32, and torch's own spectral_norm refuses that mixture.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        bound = (in_channels * kernel_size) ** -0.5
        shape = (out_channels, in_channels, kernel_size)
        self.padding = kernel_size // 2
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))
        self.weight_orig = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.register_buffer("weight_u", _unit(torch.randn(out_channels)))
        self.register_buffer("weight_v", _unit(torch.randn(in_channels * kernel_size)))

    def normalized_weight(self) -> Tensor:
        """The weight over its singular value, float32. In training this moves the two singular vectors."""
        weight = self.weight_orig.float()
        matrix = weight.flatten(1)
        u, v = self.weight_u.float(), self.weight_v.float()
        if self.training:
            with torch.no_grad():
                v = _unit(matrix.T @ u)
                u = _unit(matrix @ v)
                self.weight_u.copy_(u)
                self.weight_v.copy_(v)
        return weight / (u @ (matrix @ v))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (self.padding, self.padding), mode="circular") if self.padding else x
        return F.conv1d(padded, self.normalized_weight().to(x.dtype), self.bias)


def _unit(vector: Tensor) -> Tensor:
    return F.normalize(vector, dim=0, eps=1e-12)


class BatchNormLocal(nn.Module):
    """Batch norm over virtual batches of at most 8 consecutive samples, in float32; no running statistics."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, length = x.shape
        groups = -(-batch // VIRTUAL_BATCH)
        if batch % groups:
            raise InputError(f"the dino discriminator cannot split {batch} images into {groups} equal "
                             f"virtual batches of at most {VIRTUAL_BATCH}; choose training.micro_batch_size "
                             f"as a multiple of {VIRTUAL_BATCH}")
        grouped = x.float().view(groups, batch // groups, channels, length)
        variance, mean = torch.var_mean(grouped, dim=(1, 3), correction=0, keepdim=True)
        normalized = ((grouped - mean) * torch.rsqrt(variance + self.eps)).view(batch, channels, length)
        return (normalized * self.weight[:, None] + self.bias[:, None]).to(x.dtype)


def dino_file(weights: str | Path | None) -> WeightFile:
    name = BACKBONE_URL.rpartition("/")[2]
    return WeightFile(setting="loss.adversarial.backbone_weights", value=weights, names=(name,), url=BACKBONE_URL,
                      what=f"{name} of facebookresearch/dino")


def dino_backbone(weights: str | Path | None) -> VisionTransformer:
    """DINO's ViT-S/16 as the original uses it: tanh GELU, and no bias on the attention's keys.

    weights as in `WeightFile.value`. Raises InputError when the file is missing or another network's.
    """
    backbone = build_frozen(_vit_small, dino_file(weights))
    with torch.no_grad():
        for index in range(len(backbone.blocks)):
            backbone.get_parameter(f"blocks.{index}.attn.qkv.bias").chunk(3)[1].zero_()
    return backbone


def _vit_small() -> VisionTransformer:
    return timm_library().models.VisionTransformer(
        img_size=INPUT_SIZE, patch_size=16, embed_dim=384, depth=12, num_heads=6, num_classes=0,
        act_layer=partial(nn.GELU, approximate="tanh"), norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
