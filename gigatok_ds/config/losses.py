"""The tokenizer's objective as settings: one small dataclass per term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gigatok_ds.config.model import at_least
from gigatok_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    kind: Literal["l1", "l2"] = "l2"
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """Distance of images in a frozen network: LPIPS on VGG16, or the squared difference of what `model` gives.

    `weights` is the path of the network's published file or of a directory that holds it, null (the usual caches),
    `download` (into torch's cache) or `random`. `dropout` is the original's quirk in LPIPS.
    """

    model: Literal["vgg", "dinov2-s", "resnet50"] = "vgg"
    weight: float = 1.0
    weights: str | None = None
    dropout: bool = False

    def __post_init__(self) -> None:
        if self.dropout and self.model != "vgg":
            raise InputError("loss.perceptual.dropout is true, a setting of vgg only, not of "
                             f"{self.model}; leave it at false")


@dataclass(frozen=True, kw_only=True)
class QuantizerLossConfig:
    """Weights of the quantizer's terms; the entropy term stops at `entropy_end_step` (null: never).

    `statistics` says whose latents the mean assignment of the entropy term is of: of all data ranks (the result then
    does not depend on their number), or of each data rank (the original's).
    """

    codebook: float = 1.0
    commitment: float = 0.25
    entropy: float = 0.0
    entropy_end_step: int | None = None
    statistics: Literal["global", "data_rank"] = "global"


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """The discriminator and both sides of its game, from `start_step` on (steps are counted from 1).

    `adaptive_weight` scales the generator's side so that its gradient at the last layer is as long as that of the
    image losses. `batch_norm` says whose images the PatchGAN's batch statistics are of: of all ranks (the result then
    does not depend on their number), or of each data rank (the original's). `blur_downsampling` makes the PatchGAN
    halve the side by blurs. `lecam_weight` weighs LeCam regularization (the original's: 0.001; 0: none).
    """

    start_step: int
    weight: float = 0.5
    adaptive_weight: bool = False
    batch_norm: Literal["global", "data_rank"] = "global"
    discriminator: Literal["patchgan", "dino", "stylegan"] = "patchgan"
    discriminator_loss: Literal["hinge", "vanilla"] = "hinge"
    generator_loss: Literal["hinge", "non_saturating"] = "hinge"
    lecam_weight: float = 0.0
    base_channels: int = 64  # patchgan: of the first layer; stylegan: at 256 pixels
    layers: int = 3
    kernel_size: int = 4
    blur_downsampling: bool = False
    backbone_weights: str | None = None  # dino only: its ViT-S/16, as for the perceptual loss

    def __post_init__(self) -> None:
        at_least(1, "loss.adversarial", base_channels=self.base_channels, layers=self.layers,
                 kernel_size=self.kernel_size)
        at_least(0, "loss.adversarial", start_step=self.start_step, lecam_weight=self.lecam_weight)
        for name in ("base_channels", "layers", "kernel_size", "batch_norm", "blur_downsampling", "backbone_weights"):
            value, default = getattr(self, name), getattr(AdversarialConfig, name)
            has_it = {"base_channels": ("patchgan", "stylegan"), "backbone_weights": ("dino",)}.get(name, ("patchgan",))
            if value != default and self.discriminator not in has_it:
                raise InputError(f"loss.adversarial.{name} is {value}, a setting of {' and '.join(has_it)} only, "
                                 f"not of {self.discriminator}; leave it at {default}")


@dataclass(frozen=True, kw_only=True)
class AuxiliaryConfig:
    """Early help for the CNN: feature reconstruction and, optionally, direct reconstruction, before `end_step`."""

    end_step: int
    direct_reconstruction: bool = True
    feature: Literal["mse", "cosine"] = "mse"
    feature_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SemanticConfig:
    """Cosine alignment of the decoder's semantic head with a frozen teacher, whose tokens it predicts.

    `teacher` is a name of models.frozen.frozen_vit or a VisionTransformer of timm's; `weights` as for the perceptual
    loss.
    """

    teacher: str = "dinov2-vit-b"
    weight: float = 0.5
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig:
    """Every term of the tokenizer's objective; null leaves a term out. Steps are counted from 1."""

    reconstruction: ReconstructionConfig = ReconstructionConfig()
    perceptual: PerceptualConfig | None
    quantizer: QuantizerLossConfig = QuantizerLossConfig()
    adversarial: AdversarialConfig | None
    auxiliary: AuxiliaryConfig | None
    semantic: SemanticConfig | None

    def wants_feature_loss(self, step: int) -> bool:
        return self.auxiliary is not None and step < self.auxiliary.end_step

    def wants_direct_reconstruction(self, step: int) -> bool:
        return self.auxiliary is not None and self.auxiliary.direct_reconstruction and self.wants_feature_loss(step)

    def wants_entropy(self, step: int) -> Literal["global", "data_rank"] | None:
        """Whose mean assignment the entropy term is to be of at this step, None if there is no such term."""
        terms = self.quantizer
        active = terms.entropy > 0 and (terms.entropy_end_step is None or step < terms.entropy_end_step)
        return terms.statistics if active else None

    def discriminator_active(self, step: int) -> bool:
        return self.adversarial is not None and step >= self.adversarial.start_step
