"""The standalone checkpoint: a directory with `config.json`, `model.safetensors` and a model card (`README.md`).

Large models are sharded with an index, in the layout that Hugging Face tools read. Loading needs torch and
safetensors only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from gigatok_ds.checkpoint.model_card import model_card
from gigatok_ds.checkpoint.original import build_on_meta, written_specs
from gigatok_ds.checkpoint.tensor_files import (
    LazyTensors,
    Spec,
    TensorFiles,
    check_fits,
    check_size,
    groups_of,
    write_tensors,
)
from gigatok_ds.config.model import (
    ENCODING_PARTS,
    GPTConfig,
    TokenizerConfig,
    gpt_config_from_dict,
    tokenizer_config_from_dict,
)
from gigatok_ds.errors import InputError
from gigatok_ds.files import directory_beside, naming_failures, put_back, sha256, sync
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.parallel.sharding import declared_shards
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.plain import from_plain
from gigatok_ds.untrusted import brief, read_json

Network = TypeVar("Network", bound=nn.Module)

FORMAT = "gigatok-ds/1"
SHARD_BYTES = 4 * 1024**3
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
INDEX_FILE = "model.safetensors.index.json"
# Names of the types that models are run in.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONFIGS: dict[str, Callable[[dict[str, Any]], TokenizerConfig | GPTConfig]] = {
    "tokenizer": tokenizer_config_from_dict, "gpt": gpt_config_from_dict,
}
_USAGE = "quantizer.codebook_used"  # what training counts, and codes do not depend on


def check_destination(path: Path, *, overwrite: bool = False) -> None:
    """InputError when `path` exists, unless it is a standalone checkpoint that may be overwritten, and nothing else."""
    put_back(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another output directory or remove it")
    if path.exists():
        _refuse_foreign(path)


def _refuse_foreign(path: Path) -> None:
    """InputError, naming one, when there are files that a standalone checkpoint does not have."""
    advice = "so --overwrite leaves it alone; remove it yourself or choose another output directory"
    try:
        ours = {CONFIG_FILE, CARD_FILE, INDEX_FILE, *read_config(path)["sha256"]}
    except InputError as error:
        raise InputError(f"{path} exists already and is no standalone checkpoint ({error}), {advice}") from None
    for file in sorted(path.iterdir()):
        named = file.name in ours and (file.suffix == ".safetensors" or file.name
                                       in (CONFIG_FILE, CARD_FILE, INDEX_FILE))
        if not named or not file.is_file():
            raise InputError(f"{path} also holds {file.name}, which is not of a standalone checkpoint, {advice}")


def save_standalone(path: str | Path, config: TokenizerConfig | GPTConfig, weights: Mapping[str, Tensor], *,
                    provenance: dict[str, Any] | None = None, classes: Sequence[str] = (),
                    dtype: torch.dtype | None = None, overwrite: bool = False,
                    check: Callable[[Path], object] = lambda written: None) -> Path:
    """Write a standalone checkpoint directory, complete or not at all; few tensors are in memory at a time.

    weights are the model's own state_dict, perhaps a lazy one; parameters are converted to dtype, if given, and buffers
    stay as they are. provenance and the names of a GPT's classes, if they are known, are stored in config.json. check
    is given the directory before it takes its place and may raise: then what was there stays. Raises InputError when
    `path` exists, unless `overwrite` is set and it is a standalone checkpoint itself with nothing else in it, and when
    the weights are not those of the model. A tokenizer's provenance also gets `codes_sha256`.
    """
    path = Path(path).resolve() if overwrite else Path(path)  # a link stays one
    check_destination(path, overwrite=overwrite)
    network = build_on_meta(config)
    check_fits(weights, written_specs(network), "the state_dict")
    if isinstance(config, TokenizerConfig):
        provenance = (provenance or {}) | {"codes_sha256": codes_sha256(weights)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_failures(path), directory_beside(path, replaceable=_refuse_foreign if overwrite else None) as scratch:
        description = {
            "format": FORMAT,
            "kind": "tokenizer" if isinstance(config, TokenizerConfig) else "gpt",
            "model": dataclasses.asdict(config),
            **({"classes": list(classes)} if classes else {}),
            "provenance": provenance or {},
            "sha256": _write_weights(scratch, weights, written_specs(network, dtype)),
        }
        (scratch / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")
        card = model_card(description, parameters=sum(parameter.numel() for parameter in network.parameters()),
                          dtype=str(dtype or torch.float32).removeprefix("torch."))
        (scratch / CARD_FILE).write_text(card, encoding="utf-8")
        for file in scratch.iterdir():
            sync(file)
        check(scratch)
    return path


def _write_weights(folder: Path, weights: Mapping[str, Tensor], specs: Mapping[str, Spec]) -> dict[str, str]:
    """Write the weights files, and an index if there are several; returns the SHA-256 of each weights file."""
    shards = groups_of({name: spec.nbytes for name, spec in specs.items()}, SHARD_BYTES)
    files = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[file] = write_tensors(folder / file, {name: specs[name] for name in names}, weights.__getitem__)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs.values())}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return files


def codes_sha256(weights: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of all that a tokenizer's codes depend on: of a state_dict, in float32. Tokenizers that
    have it in common give the same codes, but for the type that they are stored and computed in.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        if name.partition(".")[0] in ENCODING_PARTS and name != _USAGE:
            value = weights[name].detach().cpu().float().contiguous()
            digest.update(f"{name} {list(value.shape)}\n".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def known_codes(provenance: Mapping[str, Any]) -> str | None:
    """The `codes_sha256` of a checkpoint's provenance; None where it does not say."""
    found = provenance.get("codes_sha256")
    return found if isinstance(found, str) else None


def check_same_codes(gpt: str | Path, tokenizer: str | Path, remedy: str) -> None:
    """Raise InputError when a GPT was trained on codes that another tokenizer makes, as far as both checkpoints say."""
    asked, given = (known_codes(read_config(path)["provenance"]) for path in (gpt, tokenizer))
    if asked and given and asked != given:
        raise InputError(f"{gpt} was trained on codes of another tokenizer than {tokenizer}: SHA-256 {asked[:8]}..., "
                         f"not {given[:8]}..., of what codes depend on; {remedy}")


def read_config(path: str | Path) -> dict[str, Any]:
    """The description in a standalone checkpoint's config.json; InputError when it is not one."""
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise InputError(f"{path} is not a standalone checkpoint: it has no {CONFIG_FILE}")
    description = read_json(file, object, advice="it is not valid JSON; copy it again")
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise InputError(f"{file} is not a {FORMAT} description; export or import the model with this version")
    if "kind" not in description:
        raise InputError(f"{file} is damaged: kind is missing; copy it again")
    for name, kind in (("model", dict), ("provenance", dict), ("sha256", dict[str, str])):
        from_plain(kind, description.setdefault(name, {}), f"{file}: {name}")
    from_plain(list[str], description.setdefault("classes", []), f"{file}: classes")
    return description


def checkpoint_hash(path: str | Path) -> str:
    """sha256 of a standalone checkpoint's description and weights: of every file's name and content."""
    files = sorted([Path(path) / CONFIG_FILE, *Path(path).glob("*.safetensors"), *Path(path).glob(INDEX_FILE)])
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + bytes.fromhex(sha256(file)))
    return digest.hexdigest()


def lazy_weights(path: str | Path) -> LazyTensors:
    """The tensors of a standalone checkpoint, each read when asked for. Raises InputError for a damaged file."""
    files, where, shapes = TensorFiles(), {}, {}
    for file in weight_files(Path(path)):
        for name in files.names(file):
            where[name], shapes[name] = file, files.shape(file, name)
    return LazyTensors(shapes, lambda name: files.read(where[name], name))


def weight_files(path: Path) -> list[Path]:
    """The weights files of a standalone checkpoint; InputError when one is missing, or said to be elsewhere."""
    names = [WEIGHTS_FILE]
    if (path / INDEX_FILE).is_file():
        try:
            names = list(dict.fromkeys(read_json(path / INDEX_FILE)["weight_map"].values()))
        except (InputError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path / INDEX_FILE} is damaged ({brief(error)}); copy the whole directory again"
            ) from None
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or not (path / name).is_file():
            raise InputError(f"{path} lacks its weights file {name!r}; copy the whole directory again")
    return [path / name for name in names]


def damaged_weights(path: Path) -> str | None:
    """What is wrong with the first weights file that is not as it was written, or None. Reads everything."""
    said = read_config(path)["sha256"]
    for file in weight_files(path):
        if said.get(file.name) != sha256(file):
            return f"{file} is damaged: its SHA-256 is not the one in {CONFIG_FILE}"
    return None


def identify(path: str | Path) -> dict[str, Any]:
    """What tells a standalone checkpoint from any other: its name, its provenance, and SHA-256 hashes of its files.

    Raises InputError when the directory is not a standalone checkpoint.
    """
    path = Path(path)
    provenance = read_config(path).get("provenance", {})
    return {"name": path.resolve().name, "provenance": provenance, "config_sha256": sha256(path / CONFIG_FILE),
            "weights_sha256": {file.name: sha256(file) for file in weight_files(path)}}


def _load(path: str | Path, kind: str, model: Network, device: str, dtype: torch.dtype, *, tensor_rank: int = 0,
          tensor_size: int = 1) -> Network:
    """The model with its weights; each tensor is cut and converted before the next is read."""
    weights, cuts = lazy_weights(path), declared_shards(model) if tensor_size > 1 else {}
    expected = written_specs(model)
    full = {name: spec if name not in cuts else
            Spec(spec.dtype, tuple(cuts[name].full_shape(torch.Size(spec.shape), tensor_size)))
            for name, spec in expected.items()}
    check_fits(weights, full, f"{path}: the {kind} described by config.json differs: model.safetensors")
    state = {}
    for name, (usual, _) in expected.items():
        value = weights[name]
        if name in cuts:
            value = cuts[name].shard(value, tensor_rank, tensor_size)
        state[name] = value.to(device=device, dtype=dtype if usual.is_floating_point else usual)
    model.load_state_dict(state, assign=True)
    if isinstance(model, GPT):
        model.class_names = read_config(path)["classes"]
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


@overload
def described_config(path: str | Path, kind: Literal["tokenizer"]) -> TokenizerConfig: ...
@overload
def described_config(path: str | Path, kind: Literal["gpt"]) -> GPTConfig: ...
@overload
def described_config(path: str | Path, kind: str) -> TokenizerConfig | GPTConfig: ...


def described_config(path: str | Path, kind: str) -> TokenizerConfig | GPTConfig:
    """The model that a standalone checkpoint's config.json describes; InputError when it is of another kind."""
    description = read_config(path)
    if description["kind"] != kind or str(kind) not in _CONFIGS:
        raise InputError(f"{path} holds a {repr(description['kind'])[:80].strip(chr(39))}, not a {kind}")
    try:
        config: TokenizerConfig | GPTConfig = _CONFIGS[kind](description["model"])
    except InputError as error:
        raise InputError(f"{Path(path) / CONFIG_FILE}: the model section is not valid ({error})") from None
    check_size(config, lazy_weights(path).shapes, str(Path(path) / CONFIG_FILE))
    if (named := len(description["classes"])) > (most := getattr(config, "num_classes", 0)):
        raise InputError(f"{Path(path) / CONFIG_FILE} names {named} classes of a model that has {most}; copy it again")
    return config


def load_tokenizer(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tokenizer:
    """Load a standalone tokenizer: `encode(images) -> codes`, `decode(codes) -> images`, `config`.

    Images are float (B, 3, S, S) in [-1, 1], codes int64 (B, T). Raises InputError when the directory is not a
    complete standalone tokenizer.
    """
    config = described_config(path, "tokenizer")
    with torch.device("meta"):
        model = Tokenizer(config)
    return _load(path, "tokenizer", model, device, dtype)


def load_gpt(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> GPT:
    """Load a standalone GPT for `gigatok_ds.generate`. Raises InputError when the directory is not one."""
    config = described_config(path, "gpt")
    with torch.device("meta"):
        model = GPT(config)
    return _load(path, "gpt", model, device, dtype)


def load_gpt_part(path: str | Path, topology: Topology, dtype: torch.dtype = torch.float32) -> GPT:
    """Load this tensor rank's part of a standalone GPT onto its device; `load_gpt` where there is one tensor rank.

    Raises InputError when the directory is not a GPT or cannot be cut so.
    """
    size = topology.tensor_size
    if size == 1:
        return load_gpt(path, device=str(topology.device), dtype=dtype)
    config = described_config(path, "gpt")
    if config.transformer.heads % size or config.vocab_size % size:
        raise InputError(f"{path} has {config.transformer.heads} heads and {config.vocab_size} codes, which {size} "
                         "tensor ranks cannot share equally; choose a number that divides both")
    return _load(path, "gpt", GPT(config, topology.layers), str(topology.device), dtype,
                 tensor_rank=topology.tensor_rank, tensor_size=size)
