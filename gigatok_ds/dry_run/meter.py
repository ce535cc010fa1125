"""What runs on tensors without storage: the bytes that are alive, and every operation with what it computes and moves.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import _scoped_library
from torch.utils._python_dispatch import TorchDispatchMode

from gigatok_ds.dry_run.floor import Floor, FloorPart
from gigatok_ds.dry_run.operators import bytes_of, flops_of, group_of, is_free, kind_of, name_of, reads, writes
from gigatok_ds.dry_run.source_lines import BlockCall, SourceLine, Sources
from gigatok_ds.dry_run.work import PRODUCTS, Operation
from gigatok_ds.monitoring.meta_cache import called

_ATEN = torch.ops.aten


def _fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """What a GPU takes; on the meta device torch itself would hold all attention weights."""
    return _ATEN._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within, attention on tensors without storage is one kernel."""
    with _scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _fused_attention, "AutogradMeta")
        yield


class BlockPass(NamedTuple):
    """A pass through a compiled block, to be counted by `compiled`: which block, in which shapes; whether the backward
    one.
    """

    signature: Hashable
    backward: bool


class Meter(TorchDispatchMode):
    """As a context: measures what runs within.

    peak: bytes of the storages that are made within and alive at a time, at most. flops: operations as monitoring.flops
    counts the hardware's. model: those of them while `of_model` is set, without distances that are computed a second
    time. calls: how often each Operation, or BlockPass, runs; calls that only name memory differently are left out.
    floor: see there, None without.
    """

    def __init__(self, floor: Floor | None = None):
        super().__init__()
        self.alive = self.peak = self.flops = self.model = 0
        self.of_model = False
        self.calls: Counter[Operation | BlockPass] = Counter()
        self.floor = floor
        self._sources = Sources()
        self._block: BlockCall | None = None
        # By address, which is another's when its storage is gone: numbers that are not.
        self._seen: dict[int, int] = {}
        self._storages = 0

    @contextlib.contextmanager
    def inside(self, signature: Hashable) -> Iterator[None]:
        """Within, operations are those of a pass through a compiled block, and so are those of its backward pass."""
        before, self._block = self._block, BlockCall(signature)
        self.calls[BlockPass(signature, False)] += 1
        try:
            yield
        finally:
            self._block = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = called(function, args, kwargs)
        flops = flops_of(function, args, kwargs, result)
        self.flops += flops
        # Of the gradients of distances, a third are the distances once more.
        repeats = function._overloadpacket is torch.ops.gigatok.assignment_gradients
        self.model += (flops - (flops // 3 if repeats else 0)) * self.of_model
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        if not is_free(function):
            self._count(function, args, kwargs, result, flops)
        return result

    def _count(self, function, args, kwargs, result, flops: int) -> None:
        place = self._sources.here(self._block)
        read, written = reads(function, args, kwargs, result), writes(function, args, kwargs, result)
        group = group_of(function)
        operation = Operation(group=_named_after(place, group), name=name_of(function).removeprefix("aten::"),
                              source=place.source,
                              kind=kind_of(function, args) if flops else "half", read=sum(moved for _, moved in read),
                              written=sum(moved for _, moved in written), flops=flops)
        if self.floor:
            self.floor.note(operation, [(self._part(tensor), bytes_of(tensor)) for tensor, _ in read],
                            [(self._part(tensor), moved) for tensor, moved in written],
                            opaque=group in PRODUCTS or group == "quantizer", backward=place.backward)
        if place.block is None:
            self.calls[operation] += 1
        elif place.backward and place.block is not self._block and not place.block.returned:
            place.block.returned = True
            self.calls[BlockPass(place.block.signature, True)] += 1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and asking would import the compiler

    def __enter__(self) -> Meter:
        self._gpu = as_on_a_gpu()
        self._gpu.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._gpu.__exit__(*error)

    def _part(self, tensor: Tensor) -> FloorPart:
        storage = self._seen.get(tensor.untyped_storage()._cdata, 0)
        return FloorPart(storage, int(tensor.storage_offset()), tensor.numel())

    def _note(self, storage: torch.UntypedStorage, *, counts: bool = True) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._storages += 1
        self._seen[key] = self._storages
        if not counts:
            return
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key, storage.nbytes()).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.alive -= size

    def ignore(self, tensors) -> None:
        """What these hold was there before, and is not counted."""
        for tensor in tensors:
            self._note(tensor.untyped_storage(), counts=False)


def _named_after(place: SourceLine, group: str) -> str:
    """Frozen networks and the quantizer are told as a whole; what a norm's own code asks for is the norm's."""
    if place.context:
        return place.context
    return "norm" if place.norm and group in ("pointwise", "copies") else group
