"""The original GigaTok files: `.pt` dictionaries with their own parameter names.

One function, `original_entry`, says where each of our parameters lives there; reading and writing both follow it.
"""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from gigatok_ds.config.model import GPTConfig, TokenizerConfig
from gigatok_ds.errors import InputError
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tokenizer import Tokenizer

_ROOMS = {
    "1d": {"cnn_encoder": "encoder", "encoder": "s2to1encoder", "decoder": "s1to2decoder"},
    "2d": {"cnn_encoder": "encoder", "encoder": "s2dencoder", "decoder": "s2ddecoder"},
}
_SHARED_ROOMS = {"cnn_decoder": "decoder", "quantizer": "quantize"}
_PACKED = re.compile(r"^(.*(?:self_attn|multihead_attn))\.([qkv])_proj\.(weight|bias)$")
_SEMANTIC_HEAD = "decoder.distill_mlp."


def build_on_meta(config: TokenizerConfig | GPTConfig) -> Tokenizer | GPT:
    """The network without storage: names and shapes only."""
    with torch.device("meta"):
        return Tokenizer(config) if isinstance(config, TokenizerConfig) else GPT(config)


def original_entry(config: TokenizerConfig | GPTConfig, name: str) -> tuple[str, int | None]:
    """Where our parameter `name` lives in the original: its name there, and which third of a packed q/k/v tensor."""
    if isinstance(config, GPTConfig):
        return name, None
    room, _, rest = name.partition(".")
    name = f"{(_ROOMS[config.layout] | _SHARED_ROOMS).get(room, room)}.{rest}"
    if name == "quantize.embedding":
        return "quantize.embedding.weight", None
    packed = _PACKED.match(name)
    if packed and not config.qk_norm:
        return f"{packed[1]}.in_proj_{packed[3]}", "qkv".index(packed[2])
    # With q/k norm the original has separate projections, like ours, but calls the last one differently.
    return (name.replace(".out_proj.", ".wo.") if config.qk_norm else name), None


def to_original(config: TokenizerConfig | GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state_dict under the original's names."""
    result: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        original, third = original_entry(config, name)
        if third is None:
            result[original] = tensor.float() if name == "quantizer.codebook_used" else tensor
        else:
            thirds.setdefault(original, {})[third] = tensor
    return result | {name: torch.cat([parts[i] for i in range(3)]) for name, parts in thirds.items()}


def from_original(config: TokenizerConfig | GPTConfig, weights: dict[str, Tensor], source: str,
                  ) -> tuple[TokenizerConfig | GPTConfig, dict[str, Tensor]]:
    """The original's state_dict under our names, checked against the model that `config` describes.

    A tokenizer file without the semantic head (a training-only part) is accepted, and the returned config says so.
    Raises InputError naming the first parameter that is missing, surplus or of another shape.
    """
    if isinstance(config, TokenizerConfig) and config.semantic_head:
        head = original_entry(config, _SEMANTIC_HEAD)[0]
        if not any(name.startswith(head) for name in weights):
            config = dataclasses.replace(config, semantic_head=None)
    result = {}
    used = set()
    for name, expected in build_on_meta(config).state_dict().items():
        original, third = original_entry(config, name)
        if original not in weights:
            raise InputError(f"{source} lacks {original}: it is not a checkpoint of this recipe")
        used.add(original)
        tensor = weights[original] if third is None else weights[original].chunk(3)[third]
        if tensor.shape != expected.shape:
            raise InputError(
                f"{source}: {original} has shape {tuple(weights[original].shape)}, which does not fit this recipe's "
                f"{tuple(expected.shape)} for {name}"
            )
        result[name] = tensor.to(expected.dtype).contiguous()
    surplus = sorted(weights.keys() - used)
    if surplus:
        raise InputError(f"{source} also holds {surplus[0]} (and {len(surplus) - 1} more): it is not of this recipe")
    return config, result


def read_original(path: str | Path, choice: str | None = None, *, kind: str) -> dict[str, Tensor]:
    """Read one set of weights from an original `.pt` file without executing anything it holds.

    choice is "ema", "model" or None for the original's own priority: ema, model, state_dict for a tokenizer; model,
    module, state_dict for a GPT. A bare state_dict counts as "model". Raises InputError when the file is not a
    checkpoint, holds anything but plain data, or lacks the chosen weights.
    """
    content = _load_plain_data(Path(path))
    if content and all(isinstance(value, Tensor) for value in content.values()):
        content = {"model": content}
    priority = [choice] if choice else {"tokenizer": ["ema", "model", "state_dict"],
                                        "gpt": ["model", "module", "state_dict"]}[kind]
    for key in priority:
        if isinstance(content.get(key), dict):
            weights = content[key]
            break
    else:
        held = ", ".join(sorted(str(key) for key in content)) or "nothing"
        raise InputError(f"{path} has no {' or '.join(priority)} weights; it holds {held}")
    strays = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if strays or not weights:
        raise InputError(f"{path}: {key} is not a state_dict ({'empty' if not weights else strays[0]})")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in weights.items()}


def _load_plain_data(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file")
    try:
        # Original checkpoints carry the command line they were trained with.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} was refused: it holds something other than plain tensors and numbers "
                         f"({_first_line(error)})") from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path} is not a readable checkpoint ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint dictionary")
    return content


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:160] or type(error).__name__
