"""Frozen networks from published weights: read as plain data, and checked to be the network they are loaded into."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gigatok_ds.errors import InputError


def read_frozen_weights(path: str | Path | None, setting: str, what: str) -> dict[str, Tensor]:
    """The state_dict in a file of published weights (`.safetensors`, or torch's format read as plain data).

    setting is the recipe key that names the file, `what` says which file it should be. Raises InputError
    naming both when the file is not given, missing or unreadable.
    """
    if path is None:
        raise InputError(f"{setting} is not set; give it the path of {what}")
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{setting}: there is no file {path}; it should be {what}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{setting}: {path} cannot be read ({reason}); it should be {what}") from None
    if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise InputError(f"{setting}: {path} is not a plain state_dict; it should be {what}")
    return state


def fill_frozen(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load exactly `state` into a network on the CPU or without storage, as float32.

    Raises InputError beginning with `source` when a name is missing or surplus or a shape differs.
    """
    expected = network.state_dict()
    wrong = sorted(expected.keys() ^ state.keys()) or sorted(
        name for name, value in expected.items() if value.shape != state[name].shape)
    if wrong:
        raise InputError(f"{source} holds another network: {wrong[0]} is missing, surplus or of another "
                         f"shape (and {len(wrong) - 1} more)")
    network.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
