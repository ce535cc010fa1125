"""Semantic regularisation: the tokenizer's decoder should predict a frozen teacher's patch tokens."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.errors import InputError
from gigatok_ds.models.dino_discriminator import IMAGENET_MEAN, IMAGENET_STD
from gigatok_ds.models.pretrained import fill_frozen, read_frozen_weights

SETTING = "loss.semantic.weights"
INPUT_SIZE = 224
# DINOv2 (Oquab et al. 2023, arXiv:2304.07193), plain and with registers: timm's name, and Meta's file.
TEACHERS = {
    "dinov2-vit-s": ("vit_small_patch14_dinov2", "dinov2_vits14_pretrain.pth"),
    "dinov2-vit-b": ("vit_base_patch14_dinov2", "dinov2_vitb14_pretrain.pth"),
    "dinov2-vit-l": ("vit_large_patch14_dinov2", "dinov2_vitl14_pretrain.pth"),
    "dinov2reg-vit-s": ("vit_small_patch14_reg4_dinov2", "dinov2_vits14_reg4_pretrain.pth"),
    "dinov2reg-vit-b": ("vit_base_patch14_reg4_dinov2", "dinov2_vitb14_reg4_pretrain.pth"),
    "dinov2reg-vit-l": ("vit_large_patch14_reg4_dinov2", "dinov2_vitl14_reg4_pretrain.pth"),
}


class Teacher(nn.Module):
    """A frozen DINOv2, always in evaluation mode. On a GPU it runs in fp16 autocast, as in the original."""

    def __init__(self, name: str, weights: str | Path | None = None, *, random_weights: bool = False):
        """weights: Meta's file or timm's (`.pth` or `.safetensors`); random_weights builds without any.

        Raises InputError for an unknown teacher and for a missing or unfitting file.
        """
        super().__init__()
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn

        if name not in TEACHERS:
            raise InputError(f"loss.semantic.teacher is {name!r}; choose one of {', '.join(TEACHERS)}")
        architecture, published = TEACHERS[name]
        what = f"{name}: {published} of facebookresearch/dinov2, or timm's {architecture}"
        state = None if random_weights else read_frozen_weights(weights, SETTING, what)
        with torch.device("cpu" if random_weights else "meta"):
            self.network = timm.create_model(architecture, img_size=INPUT_SIZE, num_classes=0)
        if state is not None:
            try:
                # timm renames what Meta calls otherwise and resamples the 37 x 37 positions to 16 x 16.
                state = checkpoint_filter_fn(state, self.network)
            except RuntimeError:
                raise InputError(f"{SETTING}: {weights} holds another network; it should be {what}") from None
            fill_frozen(self.network, state, f"{SETTING}: {weights}")
        self.name = name
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """A teacher does not train: it stays in evaluation mode whatever the module around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Normalised patch tokens (B, 256, width), row-major, of images (B, 3, H, W) in [-1, 1]."""
        with torch.autocast(images.device.type, dtype=torch.float16, enabled=images.device.type == "cuda"):
            tokens = self.network.forward_features(preprocess(images))
        return tokens[:, self.network.num_prefix_tokens :].float()


def preprocess(images: Tensor) -> Tensor:
    """Images in [-1, 1] as GigaTok's teacher sees them: normalised first, then resized to 224 (bicubic)."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    normalized = ((images.float() + 1) / 2 - mean) / std
    return F.interpolate(normalized, size=(INPUT_SIZE, INPUT_SIZE), mode="bicubic", align_corners=False)


def alignment_loss(student: Tensor, target: Tensor) -> Tensor:
    """Mean over images and tokens of minus the cosine between (B, T, width) features, in [-1, 1].

    Raises InputError when the tokenizer's grid or its semantic head does not fit the teacher.
    """
    if student.shape != target.shape:
        raise InputError(
            f"the semantic head gives {student.shape[1]} tokens of width {student.shape[2]}, the teacher "
            f"{target.shape[1]} of width {target.shape[2]}; set model.semantic_head.teacher_width to the "
            "teacher's width, and model.image_size to 16 times the CNN's downscale"
        )
    cosine = (F.normalize(student.float(), dim=-1) * F.normalize(target.float(), dim=-1)).sum(-1)
    return -cosine.mean()
