"""The standalone checkpoint: a directory with `config.json` and `model.safetensors`.

Large models are sharded with an index, in the layout that Hugging Face tools read. Loading needs torch and
safetensors only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from gigatok_ds.config.model import GPTConfig, TokenizerConfig, gpt_config_from_dict, tokenizer_config_from_dict
from gigatok_ds.errors import InputError
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.parallel.sharding import declared_shards
from gigatok_ds.parallel.topology import Topology

FORMAT = "gigatok-ds/1"
SHARD_BYTES = 4 * 1024**3
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def check_destination(path: Path, *, overwrite: bool = False) -> None:
    """InputError when `path` exists, unless it is a standalone checkpoint that may be overwritten."""
    if path.exists() and not (overwrite and (path / CONFIG_FILE).is_file()):
        raise InputError(f"{path} exists already; choose another output directory or remove it")


def save_standalone(path: str | Path, config: TokenizerConfig | GPTConfig, weights: dict[str, Tensor], *,
                    provenance: dict | None = None, overwrite: bool = False) -> Path:
    """Write a standalone checkpoint directory, complete or not at all.

    weights are the model's own state_dict; provenance is stored in config.json as it is. Raises InputError when
    `path` exists, unless `overwrite` is set and it is a standalone checkpoint itself.
    """
    path = Path(path)
    check_destination(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        _write_weights(scratch, weights)
        description = {
            "format": FORMAT,
            "kind": "tokenizer" if isinstance(config, TokenizerConfig) else "gpt",
            "model": dataclasses.asdict(config),
            "provenance": provenance or {},
        }
        (scratch / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")
        scratch.chmod(0o755)
        replaced = scratch.with_name(scratch.name + ".replaced")
        if path.exists():
            os.rename(path, replaced)
        os.rename(scratch, path)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return path


def _write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    shards = _shards(weights)
    if len(shards) == 1:
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shards(weights: dict[str, Tensor]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in weights.items():
        if shards[-1] and used + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    return shards


def read_config(path: str | Path) -> dict:
    """The description in a standalone checkpoint's config.json; InputError when it is not one."""
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise InputError(f"{path} is not a standalone checkpoint: it has no {CONFIG_FILE}")
    try:
        description = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise InputError(f"{file} is not a {FORMAT} description; export or import the model with this version")
    return description


def checkpoint_hash(path: str | Path) -> str:
    """sha256 of a standalone checkpoint's description and weights: of every file's name and content."""
    files = sorted([Path(path) / CONFIG_FILE, *Path(path).glob("*.safetensors"), *Path(path).glob(INDEX_FILE)])
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            digest.update(file.name.encode() + b"\0" + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a standalone checkpoint, on the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in _weight_files(Path(path)):
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise InputError(f"{file} is damaged ({error}); copy or export it again") from None
    return weights


def _weight_files(path: Path) -> list[Path]:
    names = [WEIGHTS_FILE]
    if (path / INDEX_FILE).is_file():
        names = sorted(set(json.loads((path / INDEX_FILE).read_text())["weight_map"].values()))
    for name in names:
        if name != os.path.basename(name) or not (path / name).is_file():
            raise InputError(f"{path} lacks its weights file {name!r}; copy the whole directory again")
    return [path / name for name in names]


def identify(path: str | Path) -> dict:
    """What tells a standalone checkpoint from any other: its name, its provenance, and SHA-256 hashes of its files.

    Raises InputError when the directory is not a standalone checkpoint.
    """
    path = Path(path)
    provenance = read_config(path).get("provenance", {})
    return {"name": path.resolve().name, "provenance": provenance, "config_sha256": _sha256(path / CONFIG_FILE),
            "weights_sha256": {file.name: _sha256(file) for file in _weight_files(path)}}


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _load(path: str | Path, kind: str, model: nn.Module, device: str, dtype: torch.dtype, *, tensor_rank: int = 0,
          tensor_size: int = 1) -> nn.Module:
    weights = read_weights(path)
    for name, shard in declared_shards(model).items() if tensor_size > 1 else ():
        if name in weights:
            weights[name] = shard.cut(weights[name], tensor_rank, tensor_size)
    expected = model.state_dict()
    missing, surplus = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    wrong = [name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape]
    for problem, names in (("lacks", missing), ("does not know", surplus), ("has another shape for", sorted(wrong))):
        if names:
            raise InputError(f"{path}: the {kind} described by config.json {problem} {names[0]} (and {len(names) - 1} more)")
    model.load_state_dict(weights, assign=True)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _described_model(path: str | Path, kind: str, rebuild, build) -> nn.Module:
    config = _described_config(path, kind, rebuild)
    with torch.device("meta"):
        return build(config)


def _described_config(path: str | Path, kind: str, rebuild) -> TokenizerConfig | GPTConfig:
    description = read_config(path)
    if description.get("kind") != kind:
        raise InputError(f"{path} holds a {description.get('kind')}, not a {kind}")
    try:
        return rebuild(description["model"])
    except (TypeError, KeyError) as error:
        raise InputError(f"{Path(path) / CONFIG_FILE}: the model section is not valid ({error})") from None


def load_tokenizer(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tokenizer:
    """Load a standalone tokenizer: `encode(images) -> codes`, `decode(codes) -> images`, `config`.

    Images are float (B, 3, S, S) in [-1, 1], codes int64 (B, T). Raises InputError when the directory is not a
    complete standalone tokenizer.
    """
    model = _described_model(path, "tokenizer", tokenizer_config_from_dict, Tokenizer)
    return _load(path, "tokenizer", model, device, dtype)


def load_gpt(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> GPT:
    """Load a standalone GPT for `gigatok_ds.generate`. Raises InputError when the directory is not one."""
    return _load(path, "gpt", _described_model(path, "gpt", gpt_config_from_dict, GPT), device, dtype)


def load_gpt_part(path: str | Path, topology: Topology, dtype: torch.dtype = torch.float32) -> GPT:
    """Load this tensor rank's part of a standalone GPT onto its device; `load_gpt` where there is one tensor rank.

    Raises InputError when the directory is not a GPT or cannot be cut so.
    """
    size = topology.tensor_size
    if size == 1:
        return load_gpt(path, device=str(topology.device), dtype=dtype)
    config = _described_config(path, "gpt", gpt_config_from_dict)
    if config.transformer.heads % size or config.vocab_size % size:
        raise InputError(f"{path} has {config.transformer.heads} heads and {config.vocab_size} codes, which {size} "
                         "tensor ranks cannot share equally; choose a number that divides both")
    return _load(path, "gpt", GPT(config, topology.layers), str(topology.device), dtype,
                 tensor_rank=topology.tensor_rank, tensor_size=size)
