"""A frozen vision transformer that gives one token per cell of a grid: DINOv2, SigLIP, CLIP, or another of timm's."""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.compat import timm_library
from gigatok_ds.errors import InputError
from gigatok_ds.models.frozen.pretrained import autocast, build_frozen
from gigatok_ds.models.frozen.pretrained_files import WeightFile

if TYPE_CHECKING:
    from timm.models import VisionTransformer

# DINOv2 (Oquab et al. 2023, arXiv:2304.07193), plain and with registers; SigLIP's shape-optimised ViT (Zhai et al.
# 2023, arXiv:2303.15343) and CLIP trained on DFN-2B (Fang et al. 2023, arXiv:2309.17425): timm's names.
VITS = {
    "dinov2-vit-s": "vit_small_patch14_dinov2.lvd142m",
    "dinov2-vit-b": "vit_base_patch14_dinov2.lvd142m",
    "dinov2-vit-l": "vit_large_patch14_dinov2.lvd142m",
    "dinov2-vit-g": "vit_giant_patch14_dinov2.lvd142m",
    "dinov2reg-vit-s": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2reg-vit-b": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2reg-vit-l": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov2reg-vit-g": "vit_giant_patch14_reg4_dinov2.lvd142m",
    "siglip-so400m": "vit_so400m_patch14_siglip_224.webli",
    "clip-dfn-vit-l": "vit_large_patch14_clip_quickgelu_224.dfn2b",
}
# What a file may hold beyond the tokens' network: classifiers and ways of pooling.
_BEYOND_TOKENS = ("head.", "head_dist.", "attn_pool.", "fc_norm.")


class FrozenViT(nn.Module):
    """Float32 weights, always in evaluation mode; the gradient passes to the image.

    Attributes: size, the side of the square images that it looks at; width, that of its tokens.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, file: WeightFile, *, setting: str, grid: int):
        """name is one of VITS or a VisionTransformer of timm's, which `setting` asks for; file is `vit_file`'s.

        The input is as large as it takes for grid x grid patches, and timm resamples the position table to them. Raises
        InputError for an unknown name and for a missing or unfitting file.
        """
        super().__init__()
        self.size = grid * _without_storage(name, setting).patch_embed.feat_ratio()
        architecture = VITS.get(name, name)
        self.network = build_frozen(lambda: _bare(architecture, self.size), file, _fitted)
        self.width = self.network.embed_dim
        self.normalised_first = name.startswith("dinov2")
        published = _published(architecture)
        for constant in ("mean", "std"):
            value = torch.tensor(getattr(published, constant)).view(3, 1, 1)
            self.register_buffer(constant, value, persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenViT:
        """It does not train: it stays in evaluation mode whatever the module around it does."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised patch tokens (B, grid * grid, width), row-major, float32, of images (B, 3, H, W) in [-1, 1]."""
        with autocast(images.device, "fp32"):
            images = self.preprocess(images.float())
        return self.network.forward_features(images)[:, self.network.num_prefix_tokens :].float()

    def preprocess(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], normalised as for the network's training, and resized to its input (plain bicubic).

        GigaTok normalises first for DINOv2 and resizes first for the others; both give the same up to rounding.
        """
        unit = (images + 1) / 2
        if self.normalised_first:
            return self._resized((unit - self.mean) / self.std)
        return (self._resized(unit) - self.mean) / self.std

    def _resized(self, images: Tensor) -> Tensor:
        return F.interpolate(images, size=(self.size, self.size), mode="bicubic", align_corners=False)


def vit_width(name: str, setting: str) -> int:
    """Width of a network's tokens, without its weights. Raises InputError for an unknown name."""
    return _without_storage(name, setting).embed_dim


def vit_file(name: str, weights: str | Path | None, *, asked_by: str, setting: str) -> WeightFile:
    """The file for a network whose name the setting `asked_by` gives; `setting` says where the file is.

    Meta's own file or timm's for DINOv2, timm's for the others. Raises InputError for an unknown name.
    """
    _without_storage(name, asked_by)
    published = _published(VITS.get(name, name))
    architecture = f"{published.architecture}.{published.tag}"
    names: tuple[str, ...] = (f"{architecture}.safetensors",)
    url, what = None, f"timm's {architecture}"
    if published.hf_hub_id:
        url = f"https://huggingface.co/{published.hf_hub_id}/resolve/main/model.safetensors"
    if published.architecture.endswith("_dinov2"):
        url = published.url
        names, what = (Path(url).name, *names), f"{Path(url).name} of facebookresearch/dinov2, or {what}"
    return WeightFile(setting=setting, value=weights, what=f"{name}: {what}", names=(*names, "model.safetensors"),
                      url=url, hub=published.hf_hub_id)


def _published(architecture: str):
    """timm's PretrainedCfg: mean, std, and where the weights are."""
    return timm_library().models.get_pretrained_cfg(architecture)


@functools.cache
def _without_storage(name: str, setting: str) -> VisionTransformer:
    """The network at its published size on the meta device. Raises InputError unless timm has such a ViT."""
    timm = timm_library()
    architecture = VITS.get(name, name)
    network = None
    if timm.is_model(architecture):
        try:
            with torch.device("meta"):
                network = timm.create_model(architecture, num_classes=0)
        except RuntimeError as error:  # timm's word for a tag that it does not have
            raise InputError(f"{setting} is {name!r}: {error}") from None
    if not isinstance(network, timm.models.VisionTransformer):
        what = "a timm model, but not a VisionTransformer" if network is not None else "not known"
        known = timm.list_models(module="vision_transformer")
        near = difflib.get_close_matches(name, [*VITS, *known], n=3, cutoff=0.6)
        raise InputError(f"{setting} is {name!r}, which is {what}; "
                         + (f"did you mean {' or '.join(near)}? " if near else "")
                         + f"Choose one of {', '.join(VITS)}, or a VisionTransformer of timm's")
    return network


def _bare(architecture: str, size: int) -> VisionTransformer:
    """timm's network for `size` x `size` images, with a norm over all tokens and nothing behind it."""
    network = timm_library().create_model(architecture, img_size=size, num_classes=0)
    if isinstance(network.norm, nn.Identity):
        # Trained to average the tokens and normalise that: the same norm then serves the tokens.
        network.norm = network.fc_norm
    network.fc_norm = nn.Identity()
    network.attn_pool = None
    return network


def _fitted(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A published state_dict in timm's names, its position table resampled to the network's grid."""
    try:
        state = timm_library().models.vision_transformer.checkpoint_filter_fn(state, network)
    except RuntimeError:
        return state  # a table that fits no grid: another network's, as is found right after
    if "norm.weight" not in state:
        state |= {f"norm.{name}": state[f"fc_norm.{name}"] for name in ("weight", "bias") if f"fc_norm.{name}" in state}
    return {name: value for name, value in state.items() if not name.startswith(_BEYOND_TOKENS)}
