"""Semantic regularisation: the tokenizer's decoder should predict a frozen teacher's patch tokens."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.config.losses import SemanticConfig
from gigatok_ds.config.model import TokenizerConfig
from gigatok_ds.errors import InputError
from gigatok_ds.models.frozen.frozen_vit import FrozenViT, vit_file, vit_width
from gigatok_ds.models.frozen.pretrained import autocast
from gigatok_ds.models.frozen.pretrained_files import WeightFile
from gigatok_ds.precision import NAMES, wide_half

SETTING = "loss.semantic.teacher"


class Teacher(nn.Module):
    """A frozen ViT, always in evaluation mode.

    On a GPU it runs in half precision whatever the training's is, as in the original; but not in float16, whose range
    the activations of some ViTs leave (`precision.wide_half`).
    """

    def __init__(self, name: str, weights: str | Path | None = None, *, grid: int = 16, precision: str = "fp32"):
        """weights as in `WeightFile.value`; grid is the side of the tokenizer's; precision the training's.

        Raises InputError for an unknown teacher and for a missing or unfitting file.
        """
        super().__init__()
        self.vit = FrozenViT(name, teacher_file(name, weights), setting=SETTING, grid=grid)
        self.precision = precision

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Normalised patch tokens (B, grid * grid, width), row-major, float32, of images (B, 3, H, W) in [-1, 1]."""
        halves = images.device.type == "cuda" or self.precision == "fp16"
        with autocast(images.device, NAMES[wide_half(images.device)] if halves else self.precision):
            return self.vit(images)


def teacher_file(name: str, weights: str | Path | None) -> WeightFile:
    """Which file a teacher needs. Raises InputError for an unknown teacher."""
    return vit_file(name, weights, asked_by=SETTING, setting="loss.semantic.weights")


def check_teacher(config: SemanticConfig, model: TokenizerConfig) -> None:
    """InputError when the tokenizer's semantic head does not give tokens of the teacher's width.

    Their number always fits, since the teacher's input is as large as the tokenizer's grid needs.
    """
    assert model.semantic_head is not None, "a teacher without a head"
    width, ours = vit_width(config.teacher, SETTING), model.semantic_head.teacher_width
    if width != ours:
        raise InputError(f"model.semantic_head.teacher_width is {ours}, but the tokens of {config.teacher} "
                         f"({SETTING}) are {width} wide; set model.semantic_head.teacher_width={width}")


def alignment_loss(student: Tensor, target: Tensor) -> Tensor:
    """Mean over images and tokens of minus the cosine between (B, T, width) features, in [-1, 1]."""
    assert student.shape == target.shape, f"the head gives {tuple(student.shape)}, the teacher {tuple(target.shape)}"
    cosine = (F.normalize(student.float(), dim=-1) * F.normalize(target.float(), dim=-1)).sum(-1)
    return -cosine.mean()
