"""safetensors files, read and written a tensor at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from gigatok_ds.errors import InputError
from gigatok_ds.untrusted import brief

_MAPPED_BYTES = 128 * 1024**2
_LARGEST_SIDE = 2**14  # of an image, on which no weight depends
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


class Spec(NamedTuple):
    """What a tensor is, before there is one."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def groups_of(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in their order, in groups of at most so many bytes together, or of one name with more."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > most:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def write_tensors(path: Path, specs: Mapping[str, Spec], read: Callable[[str], Tensor]) -> str:
    """Write a safetensors file and return its SHA-256. Each tensor is asked for when it is its turn.

    The format, from the safetensors documentation: the header's length (8 bytes, little-endian), the header (JSON,
    padded with blanks), the tensors' bytes in C order without gaps. The larger elements come first, so that all are
    aligned.
    """
    order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = specs[name]
        header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [end, end + specs[name].nbytes]}
        end += specs[name].nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        blocks: Iterator[bytes | memoryview] = chain([len(text).to_bytes(8, "little"), text],
                                                     (raw_bytes(read(name), specs[name]) for name in order))
        for block in blocks:
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def raw_bytes(tensor: Tensor, spec: Spec) -> memoryview:
    """A tensor's elements as `spec` wants them, in C order."""
    assert tuple(tensor.shape) == tuple(spec.shape), (tensor.shape, spec)
    flat = tensor.detach().to(device="cpu", dtype=spec.dtype).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class TensorFiles:
    """Open safetensors files. What was read stays mapped, and counts as memory, until they are closed: now and then.

    Raises InputError when a file is missing or damaged.
    """

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._specs: dict[tuple[Path, str], list[int]] = {}
        self._read = 0

    def read(self, path: Path, key: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """A whole tensor, or elements of a flat one: a copy."""
        value: Tensor = self._of(path, lambda file: file.get_tensor(key) if start is None else
                                 file.get_slice(key)[start:stop])
        self._read += value.nbytes
        value = value.clone()
        if self._read > _MAPPED_BYTES:
            self._open.clear()
            self._read = 0
        return value

    def names(self, path: Path) -> list[str]:
        return list(self._of(path, lambda file: file.keys()))

    def metadata(self, path: Path) -> dict[str, str]:
        found: dict[str, str] = self._of(path, lambda file: file.metadata())
        return found

    def shape(self, path: Path, key: str) -> list[int]:
        if (path, key) not in self._specs:
            self._specs[path, key] = self._of(path, lambda file: file.get_slice(key).get_shape())
        return self._specs[path, key]

    def type(self, path: Path, key: str) -> str:
        """As safetensors calls it: F32, BF16, ..."""
        return str(self._of(path, lambda file: file.get_slice(key).get_dtype()))

    def _of(self, path: Path, ask: Callable[[Any], Any]) -> Any:
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt").__enter__()
            return ask(self._open[path])
        except Exception as error:
            raise InputError(f"{path} is missing or damaged ({brief(error)})") from None


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read when asked for; their shapes are known before."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], read: Callable[[str], Tensor]):
        self.shapes, self._reader = {name: tuple(shape) for name, shape in shapes.items()}, read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._reader(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, without reading any that is not in memory."""
    if isinstance(weights, LazyTensors):
        return weights.shapes
    return {name: tuple(value.shape) for name, value in weights.items()}


def check_size(config: object, shapes: Mapping[str, Sequence[int]], source: str) -> None:
    """InputError when a description asks for a model that so many tensors and numbers cannot be of.

    Compared before anything is built: a model has at least a tensor for each of its layers, and a number for each unit
    of any width. Nothing but the weights' shapes is needed.
    """
    numbers = sum(map(math.prod, shapes.values()))
    for name, value in _sizes(config, ""):
        counts = name.endswith(("layers", "blocks", "multipliers"))
        most = len(shapes) if counts else max(numbers, _LARGEST_SIDE)
        if value > most:
            held = f"{len(shapes)} tensors" if counts else f"{numbers:,} numbers"
            raise InputError(
                f"{source}: {name} is {value}, but the weights hold {held} in all: they are not of this model"
            )


def _sizes(value: object, name: str) -> Iterator[tuple[str, int]]:
    """(dotted name, number) of every whole number of a description, and the length of every list."""
    if is_dataclass(value):
        for field in fields(value):
            yield from _sizes(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(value, (tuple, list)):
        yield name, len(value)
        for item in value:
            yield from _sizes(item, name.removesuffix("multipliers") + "multiplier")
    elif type(value) is int:
        yield name, value


def check_fits(weights: Mapping[str, Tensor], specs: Mapping[str, Spec], source: str) -> None:
    """InputError, naming the first of them, when tensors are missing, surplus or of other shapes than `specs` says."""
    shapes = shapes_of(weights)
    wrong = [name for name in specs if name in shapes and shapes[name] != tuple(specs[name].shape)]
    missing, surplus = sorted(specs.keys() - shapes.keys()), sorted(shapes.keys() - specs.keys())
    for problem, names in (("lacks", missing), ("also holds", surplus), ("has another shape for", sorted(wrong))):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            said = f": {list(shapes[names[0]])}, not {list(specs[names[0]].shape)}" if names[0] in wrong else ""
            raise InputError(f"{source} {problem} {names[0]}{said}{more}: it is not of this model")
