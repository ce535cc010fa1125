"""The tokenizer's objective: which terms are active at a step, and how much each counts.

Steps are counted from 1. Terms are returned as weighted scalars by name, so their sum is the loss; those that
are inactive at a step are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gigatok_ds.config.losses import AdversarialConfig, PerceptualConfig, TokenizerLossConfig
from gigatok_ds.losses.adversarial import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES
from gigatok_ds.losses.diffaug import diff_augment
from gigatok_ds.losses.feature import feature_loss
from gigatok_ds.losses.feature_distance import load_feature_distance
from gigatok_ds.losses.lecam import LeCam
from gigatok_ds.losses.perceptual import PerceptualDistance, load_lpips
from gigatok_ds.losses.reconstruction import RECONSTRUCTION_LOSSES
from gigatok_ds.losses.semantic import Teacher, alignment_loss
from gigatok_ds.models.discriminators.dino import DinoDiscriminator, dino_backbone
from gigatok_ds.models.discriminators.patchgan import PatchGAN
from gigatok_ds.models.discriminators.stylegan import StyleGANDiscriminator
from gigatok_ds.parallel.dropout import name_dropouts
from gigatok_ds.parallel.layers import PLAIN, Layers

if TYPE_CHECKING:
    from gigatok_ds.models.tokenizer import TokenizerOutput

# Logits of images in [-1, 1], with whatever augmentation the discriminator has.
Discriminate = Callable[[Tensor], Tensor]
Discriminator = PatchGAN | DinoDiscriminator | StyleGANDiscriminator


class TokenizerObjective(nn.Module):
    """Holds the frozen networks that losses look through; it has no trainable parameters."""

    def __init__(self, config: TokenizerLossConfig, *, perceptual: PerceptualDistance | None,
                 teacher: nn.Module | None):
        """teacher: images to (B, T, width)."""
        super().__init__()
        assert (perceptual is None) == (config.perceptual is None), "perceptual network and config disagree"
        assert (teacher is None) == (config.semantic is None), "teacher and config disagree"
        self.config = config
        self.perceptual = perceptual
        self.teacher = teacher
        if perceptual is not None:
            name_dropouts(perceptual, "perceptual")
        self.requires_grad_(False)

    def image_terms(self, images: Tensor, reconstruction: Tensor, direct_reconstruction: Tensor | None,
                    discriminate: Discriminate | None, step: int) -> dict[str, Tensor]:
        """The generator's terms that depend on images (B, 3, H, W) in [-1, 1] only.

        A direct reconstruction is the CNN decoder's output on the CNN encoder's own features; it gets the
        same terms as the reconstruction while it is wanted. discriminate may be None while the discriminator
        is inactive.
        """
        seen = self.perceptual.look(images) if self.perceptual else None
        terms = self._terms_of(images, seen, reconstruction, discriminate, step)
        if direct_reconstruction is not None and self.config.wants_direct_reconstruction(step):
            direct = self._terms_of(images, seen, direct_reconstruction, discriminate, step)
            terms |= {f"direct_{name}": value for name, value in direct.items()}
        return terms

    def _terms_of(self, images: Tensor, seen: list[Tensor] | None, reconstruction: Tensor,
                  discriminate: Discriminate | None, step: int) -> dict[str, Tensor]:
        """`seen` is what the perceptual distance made of the images."""
        config = self.config
        pixel_loss = RECONSTRUCTION_LOSSES[config.reconstruction.kind](reconstruction.float(), images.float())
        terms = {"reconstruction": config.reconstruction.weight * pixel_loss}
        if config.perceptual:
            assert self.perceptual is not None and seen is not None
            terms["perceptual"] = config.perceptual.weight * self.perceptual.distance(seen, reconstruction).mean()
        if self.config.discriminator_active(step):
            assert config.adversarial is not None
            assert discriminate is not None, "the discriminator is active but was not given"
            adversarial_loss = GENERATOR_LOSSES[config.adversarial.generator_loss]
            terms["adversarial"] = config.adversarial.weight * adversarial_loss(discriminate(reconstruction))
        return terms

    def latent_terms(self, output: TokenizerOutput, semantic_target: Tensor | None, step: int) -> dict[str, Tensor]:
        """The generator's terms that depend on the quantizer and on features of the images.

        semantic_target (B, T, width) is what the teacher gives for the images, where there is a teacher.
        """
        config, quantizer = self.config, output.quantizer_losses
        terms = {
            "codebook": config.quantizer.codebook * quantizer.codebook,
            "commitment": config.quantizer.commitment * quantizer.commitment,
        }
        if self.config.wants_entropy(step):
            terms["entropy"] = config.quantizer.entropy * quantizer.entropy
        if self.config.wants_feature_loss(step):
            assert config.auxiliary is not None
            loss = feature_loss(output.decoded_feature, output.cnn_feature, config.auxiliary.feature)
            terms["feature"] = config.auxiliary.feature_weight * loss
        if config.semantic:
            assert output.semantic_feature is not None and semantic_target is not None
            loss = alignment_loss(output.semantic_feature, semantic_target)
            terms["semantic"] = config.semantic.weight * loss
        return terms

    def discriminator_terms(self, real_logits: Tensor, fake_logits: Tensor, direct_fake_logits: Tensor | None,
                            step: int, lecam: LeCam | None = None) -> dict[str, Tensor]:
        """The discriminator's terms; like the generator's they carry the adversarial weight, except for LeCam's."""
        config = self.config.adversarial
        assert config is not None and self.config.discriminator_active(step), \
            f"the discriminator is not active at step {step}"
        loss = DISCRIMINATOR_LOSSES[config.discriminator_loss]
        terms = {"discriminator": config.weight * loss(real_logits, fake_logits)}
        if direct_fake_logits is not None and self.config.wants_direct_reconstruction(step):
            terms["direct_discriminator"] = config.weight * loss(real_logits, direct_fake_logits)
        if lecam is not None:
            lecam.update(real_logits, fake_logits, step)
            if step > config.start_step:
                terms["lecam"] = config.lecam_weight * lecam.penalty(real_logits, fake_logits)
        return terms


def build_objective(config: TokenizerLossConfig, *, device: torch.device | str, grid: int = 16,
                    precision: str = "fp32") -> TokenizerObjective:
    """The objective with its frozen networks, for a tokenizer with `grid` x `grid` cells and training's precision.

    Raises InputError naming the key of a file that is missing.
    """
    perceptual = teacher = None
    if config.perceptual:
        perceptual = build_perceptual(config.perceptual, precision=precision)
    if config.semantic:
        teacher = Teacher(config.semantic.teacher, config.semantic.weights, grid=grid, precision=precision)
    return TokenizerObjective(config, perceptual=perceptual, teacher=teacher).to(device)


def build_perceptual(config: PerceptualConfig, *, precision: str = "fp32") -> PerceptualDistance:
    if config.model == "vgg":
        return load_lpips(config.weights, dropout=config.dropout, precision=precision)
    return load_feature_distance(config.model, config.weights, precision=precision)


def build_discriminator(config: AdversarialConfig, layers: Layers = PLAIN, *,
                        image_size: int) -> Discriminator:
    """The discriminator, freshly initialised from torch's own generator: seed it first.

    It is called with this rank's images (B, 3, H, W) in [-1, 1] and, for what it draws, SampleDraws. Its attribute
    `lecam` holds the running means of LeCam regularization, None without. Raises InputError when the DINO backbone's
    file is missing.
    """
    network = layers.per_image(_bare_discriminator(config, layers, image_size))
    network.lecam = LeCam(config.start_step, layers.image_mean(all_data=True)) if config.lecam_weight else None
    return network


def lecam_of(discriminator: nn.Module) -> LeCam | None:
    """The running means of LeCam regularization that a discriminator of `build_discriminator` has, if it has any."""
    lecam = discriminator.lecam
    assert lecam is None or isinstance(lecam, LeCam)
    return lecam


def _bare_discriminator(config: AdversarialConfig, layers: Layers, image_size: int) -> Discriminator:
    if config.discriminator == "dino":
        return DinoDiscriminator(dino_backbone(config.backbone_weights), augment=diff_augment)
    if config.discriminator == "stylegan":
        return StyleGANDiscriminator(image_size, base_channels=config.base_channels)
    average = layers.image_mean(all_data=config.batch_norm == "global")
    return PatchGAN(base_channels=config.base_channels, layers=config.layers, kernel_size=config.kernel_size,
                    average=average, blur=config.blur_downsampling)
