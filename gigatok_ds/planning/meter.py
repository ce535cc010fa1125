"""What runs on tensors without storage: the bytes that are alive, the floating-point operations, the kernels."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.library import _scoped_library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from gigatok_ds.training.flops import own_formulas
from gigatok_ds.training.remembered_calls import called

_ATEN = torch.ops.aten


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *more, out_shape=None, **options) -> int:
    """Two matrix products over (batch, heads, tokens, features)."""
    batch, heads, queries, features = query
    return 2 * batch * heads * queries * key[2] * (features + value[3])


def _attention_backward(gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *more,
                        out_shape=None, **options) -> int:
    """Four: what a fused kernel computes again does not count, as in training.flops."""
    return 2 * _attention(query, key, value)


_FORMULAS = flop_registry | {operator: shape_wrapper(formula) for operator, formula in {
    **own_formulas(again=True),
    _ATEN._scaled_dot_product_flash_attention: _attention,
    _ATEN._scaled_dot_product_flash_attention_backward: _attention_backward,
}.items()}


def _fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """What a GPU takes; on the meta device torch itself would hold all attention weights."""
    return _ATEN._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]


class Meter(TorchDispatchMode):
    """As a context: measures what runs within.

    peak: bytes of the storages that are made within and alive at a time, at most. flops: operations as training.flops counts the
    hardware's. model: those of them while `of_model` is set, without distances that are computed a second time. kernels: calls of
    operators that are more than a view; on a GPU each starts a kernel or more.
    """

    def __init__(self):
        super().__init__()
        self.alive = self.peak = self.flops = self.model = self.kernels = 0
        self.of_model = False
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = called(function, args, kwargs)
        self.kernels += not function.is_view
        if formula := _FORMULAS.get(function._overloadpacket):
            operations = formula(*args, **kwargs, out_val=result)
            # Of the gradients of distances, a third are the distances once more.
            repeats = function._overloadpacket is torch.ops.gigatok.assignment_gradients
            self.flops += operations
            self.model += (operations - (operations // 3 if repeats else 0)) * self.of_model
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and asking would import the compiler

    def __enter__(self) -> Meter:
        self._library = _scoped_library("aten", "IMPL")
        self._library.__enter__().impl("scaled_dot_product_attention", _fused_attention, "AutogradMeta")
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._library.__exit__(*error)

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key, storage.nbytes()).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size

    def ignore(self, tensors) -> None:
        """What these hold was there before, and is not counted."""
        self._seen.update(tensor.untyped_storage()._cdata for tensor in tensors)
