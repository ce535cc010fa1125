"""Operators on tensors without storage, whose results are known from earlier calls.

torch finds the shapes of most results in Python, which takes far longer than to look them up; and a network's layers
repeat each other.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload

MOST = 100_000  # results, more than any network here has; some 50 MB

# By operator and arguments: (shape, strides, type) of each tensor that it returns, and whether they come as a tuple.
_KNOWN: dict[Hashable, tuple[list[tuple], bool]] = {}


def called(function: OpOverload, args: Sequence, kwargs: Mapping) -> object:
    """What the operator returns for these arguments; to be called where a dispatch mode would call the operator."""
    if not _makes_new_tensors(function):
        return function(*args, **kwargs)
    key = _described((function, args, kwargs))
    if key in _KNOWN:
        outputs, is_tuple = _KNOWN[key]
        made = [torch.empty_strided(shape, strides, dtype=dtype, device="meta") for shape, strides, dtype in outputs]
        return tuple(made) if is_tuple else made[0]
    result = function(*args, **kwargs)
    results = result if isinstance(result, tuple) else (result,)
    if all(map(_is_plain, results)):
        if len(_KNOWN) == MOST:
            _KNOWN.clear()
        _KNOWN[key] = [(made.shape, made.stride(), made.dtype) for made in results], isinstance(result, tuple)
    return result


@functools.cache
def _makes_new_tensors(function: OpOverload) -> bool:
    return not function._schema.is_mutable and all(value.alias_info is None for value in function._schema.returns)


def _is_plain(output: object) -> bool:
    """Whether it is a tensor without storage that another can be made like."""
    return (type(output) is Tensor and output.is_meta and bool(output.storage_offset() == 0)
            and output.untyped_storage().nbytes() == output.numel() * output.element_size())


def _described(value: object) -> Hashable:
    """All that a result's shape depends on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((name, _described(item)) for name, item in value.items())
    return type(value), value
