"""What an operator computes and moves: FLOPs, bytes read and written, and the group that reports name it under.

Every tensor that goes in is read once and every tensor that comes out is written once, with the exceptions below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry, shape_wrapper

from gigatok_ds.monitoring.flops import own_formulas

_ATEN = torch.ops.aten


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *more, out_shape=None, **options) -> int:
    """Two matrix products over (batch, heads, tokens, features)."""
    batch, heads, queries, features = query
    return 2 * batch * heads * queries * key[2] * (features + value[3])


def _attention_backward(gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *more,
                        out_shape=None, **options) -> int:
    """Four: what a fused kernel computes again does not count, as in monitoring.flops."""
    return 2 * _attention(query, key, value)


_OWN: dict[Callable, Callable[..., int]] = own_formulas(again=True) | {
    _ATEN._scaled_dot_product_flash_attention: _attention,
    _ATEN._scaled_dot_product_flash_attention_backward: _attention_backward,
}
FORMULAS = flop_registry | {operator: shape_wrapper(formula) for operator, formula in _OWN.items()}

# How often a kernel reads its first tensors from memory, where that is more than once: a norm over more than a
# multiprocessor can hold reads for its statistics first. Operators of ours that are not named here count as all others
# do: what goes in and out, once.
CROSSINGS: dict[str, tuple[int, ...]] = {
    "aten::native_group_norm": (2,),
    "aten::native_group_norm_backward": (2, 2),
    "aten::native_batch_norm": (2,),
    "aten::_native_batch_norm_legit": (2,),
    "aten::native_batch_norm_backward": (2, 2),
}

# Of these only as much is read as comes out: rows of a table.
_PICKING = {"embedding", "index", "index_select", "gather", "slice_scatter"}
# Nothing of what they change is read.
_FILLING = {"fill_", "zero_", "copy_", "normal_", "uniform_"}
# No kernel starts: they name memory, or ask about a tensor; or it is told as communication (dry_run.meta_layers).
_FREE = {"detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias", "empty", "empty_like", "new_empty",
         "empty_strided", "new_empty_strided", "is_pinned", "set_", "resize_", "exchanged"}
_COPYING = {"clone", "_to_copy", "copy_", "contiguous", "cat", "stack", "repeat", "constant_pad_nd", "slice_backward",
            "select_backward", "split_with_sizes_copy", "fill_", "zero_", "zeros", "zeros_like", "ones", "ones_like",
            "full", "full_like", "new_zeros", "new_ones", "new_full", "arange", "scalar_tensor", "roll", "flip"}


@functools.cache
def is_free(function: OpOverload) -> bool:
    """Whether nothing runs on a GPU for it."""
    return function.is_view or name_of(function).partition("::")[2] in _FREE


@functools.cache
def name_of(function: OpOverload) -> str:
    """namespace::operator, without the overload."""
    return function._schema.name


@functools.cache
def group_of(function: OpOverload) -> str:
    """One of work.GROUPS, as far as the operator alone tells."""
    space, _, name = name_of(function).partition("::")
    if "attention" in name:
        return "attention"
    if "conv" in name and "convert" not in name:
        return "convolution"
    if function._overloadpacket in FORMULAS:
        return "quantizer" if space == "gigatok" else "matrix"
    if "norm" in name and name not in ("linalg_vector_norm", "norm"):
        return "norm"
    if space == "gigatok" and ("code" in name or "assignment" in name):
        return "quantizer"
    return "copies" if name in _COPYING else "pointwise"


def flops_of(function: OpOverload, args: Sequence, kwargs: Mapping, result: object) -> int:
    formula = FORMULAS.get(function._overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


def kind_of(function: OpOverload, args: Sequence) -> str:
    """The kind of its products: "half"; "tf32" where torch lets tensor cores round float32; else "fp32"."""
    dtype = next((tensor.dtype for tensor in _tensors(args) if tensor.dtype.is_floating_point), torch.float32)
    if dtype.itemsize <= 2:
        return "half"
    space = name_of(function).partition("::")[0]
    rounds = (
        torch.backends.cudnn.allow_tf32
        if group_of(function) == "convolution"
        else torch.backends.cuda.matmul.allow_tf32
    )
    return "tf32" if rounds and space == "aten" else "fp32"


def bytes_of(tensor: Tensor) -> int:
    """That lie in memory: what is expanded lies there once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def reads(function: OpOverload, args: Sequence, kwargs: Mapping, result: object) -> list[tuple[Tensor, int]]:
    """The tensors that it reads, each with the bytes that it reads of it."""
    name = name_of(function)
    taken = [args[1:] if name.partition("::")[2] in _FILLING else args, list(kwargs.values())]
    found = [(tensor, bytes_of(tensor)) for tensor in _tensors(taken)]
    if name.partition("::")[2] in _PICKING and found:
        table, moved = found[0]
        found[0] = table, min(moved, sum(map(bytes_of, _tensors([result]))))
    for place, times in enumerate(CROSSINGS.get(name, ())[: len(found)]):
        tensor, moved = found[place]
        found[place] = tensor, times * moved
    return found


def writes(function: OpOverload, args: Sequence, kwargs: Mapping, result: object) -> list[tuple[Tensor, int]]:
    """The tensors that it writes, each with its bytes."""
    found = [*_tensors(list(_changed(function, args, kwargs))), *_tensors([result])]
    return [(tensor, bytes_of(tensor)) for tensor in {id(tensor): tensor for tensor in found}.values()]


def _changed(function: OpOverload, args: Sequence, kwargs: Mapping) -> Iterator[object]:
    if not function._schema.is_mutable:
        return
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield kwargs.get(argument.name) if argument.kwarg_only or place >= len(args) else args[place]


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
