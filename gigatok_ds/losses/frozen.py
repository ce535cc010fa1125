"""Which files of published weights an objective needs: known before any network is built."""

from __future__ import annotations

from gigatok_ds.config.losses import TokenizerLossConfig
from gigatok_ds.losses.feature_distance import dinov2_file, resnet_file
from gigatok_ds.losses.perceptual import heads_file, vgg_file
from gigatok_ds.losses.semantic import teacher_file
from gigatok_ds.models.discriminators.dino import dino_file
from gigatok_ds.models.frozen.pretrained_files import WeightFile

_PERCEPTUAL = {"vgg": vgg_file, "dinov2-s": dinov2_file, "resnet50": resnet_file}


def weight_files(config: TokenizerLossConfig) -> list[WeightFile]:
    """The files of the networks that the losses look through. Raises InputError for a network that there is not."""
    files = []
    if config.perceptual:
        files.append(_PERCEPTUAL[config.perceptual.model](config.perceptual.weights))
        if config.perceptual.model == "vgg":
            files.append(heads_file())
    if config.semantic:
        files.append(teacher_file(config.semantic.teacher, config.semantic.weights))
    if config.adversarial and config.adversarial.discriminator == "dino":
        files.append(dino_file(config.adversarial.backbone_weights))
    return files
