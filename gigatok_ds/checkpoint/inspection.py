"""What is at a path: a run, a training checkpoint, a standalone model or an original `.pt`, as plain data.

Nothing is loaded but descriptions and shapes; `check` reads everything once to compare SHA-256.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from gigatok_ds.checkpoint.class_names import CLASSES_FILE, read_classes
from gigatok_ds.checkpoint.fragments import SavedEngine
from gigatok_ds.checkpoint.pt_file import load_plain_data
from gigatok_ds.checkpoint.run_directory import (
    PARTIAL,
    RECIPE_FILE,
    REMOVED,
    STATE_FILE,
    complete_checkpoints,
    damaged_file,
    read_state,
)
from gigatok_ds.checkpoint.standalone import damaged_weights, read_config, weight_files
from gigatok_ds.checkpoint.tensor_files import TensorFiles
from gigatok_ds.errors import InputError
from gigatok_ds.files import sha256


def inspect(path: Path, *, check: bool = False) -> dict[str, Any]:
    """A description of what is at `path`. Raises InputError when it is nothing of ours, or unreadable."""
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_file():
        return _original(path)
    if (path / "checkpoints").is_dir():
        return _run(path, check)
    if path.name.startswith("step-") or (path / STATE_FILE).is_file():
        return {"what": "training checkpoint", **_checkpoint(path, check)}
    return _standalone(path, check)


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _run(path: Path, check: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"what": "training run", "recipe": _recipe(path / RECIPE_FILE)}
    found["checkpoints"] = [_checkpoint(folder, check) for _, folder in complete_checkpoints(path)]
    found["incomplete"] = sorted(folder.name for folder in (path / "checkpoints").glob("step-*")
                                 if folder.name.endswith((PARTIAL, REMOVED)) or not (folder / STATE_FILE).is_file())
    found["bytes"] = folder_bytes(path)
    return found


def _checkpoint(path: Path, check: bool) -> dict[str, Any]:
    """One that is incomplete or damaged is described as such."""
    found = {"path": str(path), "complete": False, "bytes": folder_bytes(path)}
    try:
        return found | _complete(path, check)
    except InputError as error:
        return found | {"damaged": str(error)}


def _complete(path: Path, check: bool) -> dict[str, Any]:
    state = read_state(path)
    missing = next((name for name in state.files if not (path / name).is_file()), None)
    if missing:
        raise InputError(f"{path / missing} is missing")
    found = {"complete": True, "step": state.step, "samples": state.samples,
             "topology": {"ranks": state.world_size, "tensor": state.tensor_size,
                          "data": state.world_size // state.tensor_size, "zero_stage": state.stage},
             "metrics": state.metrics, "parts": {part: _engine(path / part) for part in state.parts}}
    if classes := read_classes(path / CLASSES_FILE):
        found["classes"] = classes
    if (path / RECIPE_FILE).is_file():
        found["recipe"] = _recipe(path / RECIPE_FILE)
    found["sha256"] = state.files
    if check:
        found["damaged"] = damaged_file(path, state)
    return found


def _engine(folder: Path) -> dict[str, Any]:
    saved = SavedEngine(folder)
    shapes = [saved.shape(name) for name in saved.layout.parameters]
    return {"parameters": sum(math.prod(shape) for shape in shapes), "tensors": len(shapes),
            "holds": saved.layout.kinds, "adam_steps": max(saved.layout.adam_steps.values(), default=0)}


def _recipe(path: Path) -> dict[str, Any] | None:
    """The recipe's mapping, with defaults, as the run resolved it."""
    if not path.is_file():
        return None
    from gigatok_ds.config.load import load_recipe, recipe_to_dict, without_secrets

    return recipe_to_dict(without_secrets(load_recipe(str(path))))


def _standalone(path: Path, check: bool) -> dict[str, Any]:
    description = read_config(path)
    files = TensorFiles()
    tensors = [(file, name) for file in weight_files(path) for name in files.names(file)]
    sizes = [math.prod(files.shape(file, name)) for file, name in tensors]
    found = {"what": f"standalone {description['kind']}", "complete": True, "bytes": folder_bytes(path),
             "numbers": sum(sizes), "tensors": len(tensors),
             "types": sorted({files.type(file, name) for file, name in tensors}), "model": description["model"],
             **({"classes": description["classes"]} if description["classes"] else {}),
             "provenance": description["provenance"], "sha256": description["sha256"]}
    if check:
        found["damaged"] = damaged_weights(path)
    return found


def _original(path: Path) -> dict[str, Any]:
    """A `.pt`: each of its dictionaries of tensors, and how many other things it holds."""
    content = load_plain_data(path)
    if content and all(isinstance(value, Tensor) for value in content.values()):
        content = {"(a bare state_dict)": content}
    weights = {}
    for key, value in content.items():
        tensors = [tensor for tensor in value.values() if isinstance(tensor, Tensor)] if isinstance(value, dict) else []
        if tensors:
            weights[str(key)] = {"numbers": sum(tensor.numel() for tensor in tensors), "tensors": len(tensors),
                                 "types": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})}
    return {"what": "original GigaTok or LlamaGen checkpoint (.pt)", "bytes": path.stat().st_size, "weights": weights,
            "other": {str(key): value for key, value in content.items() if isinstance(value, (int, float, str))},
            "sha256": sha256(path)}
