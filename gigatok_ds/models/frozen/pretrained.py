"""Frozen networks from published weights: read as plain data, and checked to be the network they are loaded into."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gigatok_ds.errors import InputError
from gigatok_ds.file_kinds import mistaken_weights
from gigatok_ds.models.frozen.pretrained_files import WeightFile
from gigatok_ds.precision import PRECISIONS
from gigatok_ds.streams import stream_key

Network = TypeVar("Network", bound=nn.Module)

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_frozen_weights(file: WeightFile) -> dict[str, Tensor]:
    """The state_dict in a file of published weights (`.safetensors`, or torch's format read as plain data).

    Raises InputError naming the setting and the file when it is missing or unreadable.
    """
    path = file.find()
    mistaken = None if path.suffix == ".safetensors" else mistaken_weights(path)
    if mistaken:
        raise InputError(f"{file.setting}: {path} cannot be read: {mistaken}; it should be {file.what}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{file.setting}: {path} cannot be read ({reason}); it should be {file.what}") from None
    if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise InputError(f"{file.setting}: {path} is not a plain state_dict; it should be {file.what}")
    return state


def fill_frozen(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load exactly `state` into a network on the CPU or without storage, as float32.

    Raises InputError beginning with `source` when a name is missing or surplus, a shape differs, or values are no
    finite fractions.
    """
    expected = network.state_dict()
    wrong = sorted(expected.keys() ^ state.keys()) or sorted(
        name for name, value in expected.items() if value.shape != state[name].shape)
    if wrong:
        raise InputError(f"{source} holds another network: {wrong[0]} is missing, surplus or of another "
                         f"shape (and {len(wrong) - 1} more)")
    for name, value in state.items():
        if expected[name].is_floating_point() and (value.dtype not in _FLOATS or _not_finite(value)):
            raise InputError(f"{source}: {name} is of type {str(value.dtype).removeprefix('torch.')} or holds values "
                             "that are not finite; the file is quantized or damaged")
    network.load_state_dict({name: value.float() if value.is_floating_point() else value
                             for name, value in state.items()}, assign=True)


def _not_finite(value: Tensor) -> bool:
    """Whether a tensor holds NaN or infinite values; one without storage does not."""
    return not value.is_meta and not bool(torch.isfinite(value).all())


def build_frozen(build: Callable[[], Network], file: WeightFile,
                 fitted: Callable[[dict[str, Tensor], Network], dict[str, Tensor]] | None = None) -> Network:
    """The network of `build` with the weights in `file`, or with random ones that depend on its setting's name only.

    `fitted` makes of the file's state_dict the one that the network (without storage) takes. Raises InputError for a
    missing file and for another network's.
    """
    if file.is_random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_key(0, "frozen", file.setting))
            return build()
    state = read_frozen_weights(file)
    with torch.device("meta"):
        network = build()
    fill_frozen(network, fitted(state, network) if fitted else state, f"{file.setting}: {file.find()}")
    return network


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """A frozen network with float32 weights computes in the training's precision (fp32, bf16 or fp16) within."""
    if device.type == "meta":
        return nullcontext() if precision == "fp32" else _MetaAutocast(PRECISIONS[precision])
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


class _MetaAutocast(TorchFunctionMode):
    """The same for tensors without storage, of which torch's own autocast knows nothing: the types of products."""

    PRODUCTS = (F.conv2d, F.linear, torch.matmul, Tensor.matmul, F.scaled_dot_product_attention)

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.PRODUCTS:
            args = [value.to(self.dtype) if isinstance(value, Tensor) else value for value in args]
        return function(*args, **(kwargs or {}))
