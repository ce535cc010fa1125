"""The original GigaTok files: `.pt` dictionaries with their own parameter names.

One function, `original_entry`, says where each of our parameters lives there; reading and writing both follow it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from gigatok_ds.checkpoint.pt_file import lazy_tensors, load_plain_data, write_pt
from gigatok_ds.checkpoint.tensor_files import LazyTensors, Spec, check_fits, check_size, shapes_of
from gigatok_ds.config.model import GPTConfig, TokenizerConfig
from gigatok_ds.errors import InputError
from gigatok_ds.files import naming_failures, scratch_beside
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tokenizer import Tokenizer

_ROOMS = {
    "1d": {"cnn_encoder": "encoder", "encoder": "s2to1encoder", "decoder": "s1to2decoder"},
    "2d": {"cnn_encoder": "encoder", "encoder": "s2dencoder", "decoder": "s2ddecoder"},
}
_SHARED_ROOMS = {"cnn_decoder": "decoder", "quantizer": "quantize"}
_PACKED = re.compile(r"^(.*(?:self_attn|multihead_attn))\.([qkv])_proj\.(weight|bias)$")
_SEMANTIC_HEAD = "decoder.distill_mlp."
_KEY = "model"  # under which we write a state_dict
# Of parameters; whole numbers are counts in buffers.
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_STORED = (*_FLOATS, torch.int64, torch.int32, torch.bool)
_USAGE = "quantizer.codebook_used"  # float32 in the original
# What generation leaves in a GPT's state_dict, and is not learned.
_CACHE = re.compile(r"(^|\.)(kv_cache\.|freqs_cis$|causal_mask$)")


@overload
def build_on_meta(config: TokenizerConfig) -> Tokenizer: ...
@overload
def build_on_meta(config: GPTConfig) -> GPT: ...
@overload
def build_on_meta(config: TokenizerConfig | GPTConfig) -> Tokenizer | GPT: ...


def build_on_meta(config: TokenizerConfig | GPTConfig) -> Tokenizer | GPT:
    """The network without storage: names and shapes only."""
    with torch.device("meta"):
        return Tokenizer(config) if isinstance(config, TokenizerConfig) else GPT(config)


def written_specs(network: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Spec]:
    """What the tensors of a network's checkpoint are: parameters of `dtype`, if given, and buffers as they are."""
    parameters = {name for name, _ in network.named_parameters()}
    return {name: Spec(dtype if dtype and name in parameters else value.dtype, tuple(value.shape))
            for name, value in network.state_dict().items()}


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


def to_original(config: TokenizerConfig | GPTConfig, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Our state_dict under the original's names, each tensor made when asked for."""
    sources: dict[str, list[str]] = {}  # of a packed tensor, its three parts: q, k and v come in this order
    for name in weights:
        sources.setdefault(original_entry(config, name)[0], []).append(name)
    for original, names in sources.items():
        sources[original] = sorted(names, key=lambda name: original_entry(config, name)[1] or 0)

    def read(original: str) -> Tensor:
        parts = [weights[name] for name in sources[original]]
        full = torch.cat(parts) if len(parts) > 1 else parts[0]
        return full.float() if sources[original] == [_USAGE] else full

    shapes = shapes_of(weights)
    return LazyTensors({original: _packed_shape(shapes[names[0]], len(names)) for original, names in sources.items()},
                       read)


def _packed_shape(shape: Sequence[int], count: int) -> tuple[int, ...]:
    return (count * shape[0], *shape[1:]) if count > 1 else tuple(shape)


def original_specs(config: TokenizerConfig | GPTConfig, specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """What the tensors of `to_original` are, given what ours are."""
    found: dict[str, Spec] = {}
    for name, (dtype, shape) in specs.items():
        original, third = original_entry(config, name)
        found[original] = Spec(torch.float32 if name == _USAGE else dtype,
                               _packed_shape(shape, 1 if third is None else 3))
    return found


def from_original(config: TokenizerConfig | GPTConfig, weights: Mapping[str, Tensor], source: str,
                  ) -> tuple[TokenizerConfig | GPTConfig, Mapping[str, Tensor]]:
    """The original's state_dict under our names, each tensor made when asked for.

    A tokenizer file without the semantic head (a training-only part) is accepted, and the returned config says so.
    Raises InputError naming the first parameter that is missing, surplus or of another shape.
    """
    if isinstance(config, TokenizerConfig) and config.semantic_head:
        head = original_entry(config, _SEMANTIC_HEAD)[0]
        if not any(name.startswith(head) for name in weights):
            config = dataclasses.replace(config, semantic_head=None)
    check_size(config, shapes_of(weights), source)
    specs = written_specs(build_on_meta(config))
    check_fits(weights, original_specs(config, specs), source)

    packed: dict[str, Tensor] = {}  # the last packed tensor: it is asked for three times in a row

    def read(name: str) -> Tensor:
        original, third = original_entry(config, name)
        if original not in packed:
            packed.clear()
            packed[original] = weights[original]
        value, dtype = packed[original], specs[name].dtype
        if dtype.is_floating_point and value.dtype not in _FLOATS:
            raise InputError(f"{source}: {original} holds whole numbers ({str(value.dtype).removeprefix('torch.')}) "
                             "where the model has fractions; a quantized file must be turned back first")
        return (value if third is None else value.chunk(3)[third]).to(dtype).contiguous()

    return config, LazyTensors({name: spec.shape for name, spec in specs.items()}, read)


def read_original(path: str | Path, choice: str | None = None, *, kind: str) -> Mapping[str, Tensor]:
    """One set of weights of an original `.pt` file, each tensor read when asked for; nothing it holds is executed.

    choice is "ema", "model" or None for the original's own priority: ema, model, state_dict for a tokenizer; model,
    module, state_dict for a GPT. A bare state_dict counts as "model". Raises InputError when the file is not a
    checkpoint, holds anything but plain data, or lacks the chosen weights.
    """
    priority = [choice] if choice else {"tokenizer": ["ema", "model", "state_dict"],
                                        "gpt": ["model", "module", "state_dict"]}[kind]
    return lazy_tensors(Path(path), lambda content: _chosen(content, priority, path))


def _chosen(content: dict[str, Any], priority: list[str], path: str | Path) -> dict[str, Tensor]:
    if content and all(isinstance(value, Tensor) for value in content.values()):
        content = {"model": content}
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
    plain: dict[str, str] = {}  # ours, without what DDP and torch.compile put in front, to the file's
    for name, value in weights.items():
        if _CACHE.search(name):
            continue
        short = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
        if plain.setdefault(short, name) != name:
            raise InputError(
                f"{path}: {key} holds both {plain[short]} and {name}, which are one parameter; leave one out"
            )
        if value.dtype not in _STORED or value.layout != torch.strided:
            kind = value.dtype if value.layout == torch.strided else value.layout
            raise InputError(f"{path}: {name} is of type {str(kind).removeprefix('torch.')}, but only plain float64, "
                             "float32, float16 and bfloat16 are converted; turn it back into one of these first")
    return {short: weights[name] for short, name in plain.items()}


def save_original(path: Path, config: TokenizerConfig | GPTConfig, weights: Mapping[str, Tensor], *,
                  dtype: torch.dtype | None = None, overwrite: bool = False,
                  check: Callable[[Path], object] = lambda written: None) -> Path:
    """Write a `.pt` as the original's code reads it, {"model": state_dict}, whole or not at all.

    Few tensors are in memory at a time. With dtype, parameters are converted. check is given the file before it takes
    its place and may raise: then what was there stays. Raises InputError when `path` exists, unless `overwrite` is set
    and it holds a state_dict under "model" and nothing else, or when the weights are not the model's.
    """
    path = path.resolve() if overwrite else path  # a link stays one
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another file or give --overwrite")
    if path.exists():
        _refuse_foreign(path)
    network = build_on_meta(config)
    check_fits(weights, written_specs(network), "the state_dict")
    specs = original_specs(config, written_specs(network, dtype))
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_failures(path), scratch_beside(path) as scratch:
        write_pt(scratch, _KEY, specs, to_original(config, weights).__getitem__)
        check(scratch)
    return path


def _refuse_foreign(path: Path) -> None:
    """InputError when a file is not what `save_original` writes."""
    try:
        content = load_plain_data(path)
    except InputError as error:
        raise InputError(
            f"--overwrite replaces checkpoints only: {error}; remove it yourself or choose another file"
        ) from None
    strays = [str(key) for key in content if key != _KEY]
    weights = content.get(_KEY)
    if strays or not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(
            f"{path} holds more than weights ({strays[0] if strays else _KEY}), so --overwrite leaves it alone; "
            "remove it yourself or choose another file"
        )
