"""`Layers` of one tensor rank on its own: the shapes of its part, and a note of what it would send to the others."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gigatok_ds.parallel.cross_entropy import head_cross_entropy
from gigatok_ds.parallel.layers import REPLICATED_REGION, TensorParallelLayers, declared
from gigatok_ds.parallel.partial import mark_partial_parameter
from gigatok_ds.parallel.sharding import column_shards, row_shards


@dataclass
class TensorTraffic:
    """Bytes that a rank sends to its tensor group, by kind of collective, with ring algorithms: of n ranks' S bytes an
    all-reduce sends 2 (n - 1) / n S, an all-gather or a reduce-scatter (n - 1) / n S."""

    size: int
    sent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def all_reduce(self, tensor: Tensor) -> None:
        self.sent["all-reduce"] += 2 * (self.size - 1) / self.size * tensor.nbytes

    def all_gather(self, full: Tensor) -> None:
        self.sent["all-gather"] += (self.size - 1) / self.size * full.nbytes

    def reduce_scatter(self, full: Tensor) -> None:
        self.sent["reduce-scatter"] += (self.size - 1) / self.size * full.nbytes

    @property
    def total(self) -> float:
        return sum(self.sent.values())


@torch.library.custom_op("gigatok::exchanged", mutates_args=())
def _exchanged(x: Tensor, rows: int) -> Tensor:
    """What comes of x by exchange with other ranks, so many rows: an operator, so that a compiler sees what depends on
    what.
    """
    raise NotImplementedError("there are no other ranks")


@_exchanged.register_fake
def _(x: Tensor, rows: int) -> Tensor:
    return x.new_empty((rows, *x.shape[1:]))


def _grown(part: Tensor, size: int) -> Tensor:
    return _exchanged(part, part.shape[0] * size)


def _shrunk(full: Tensor, size: int) -> Tensor:
    return _exchanged(full, full.shape[0] // size)


class _Gather(torch.autograd.Function):
    """Parts to a whole; backward takes the own part, or sums what all ranks have for it (`summed`)."""

    @staticmethod
    def forward(ctx, part: Tensor, traffic: TensorTraffic, summed: bool) -> Tensor:
        ctx.traffic, ctx.summed = traffic, summed
        full = _grown(part, traffic.size)
        traffic.all_gather(full)
        return full

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if ctx.summed:
            ctx.traffic.reduce_scatter(gradient)
        return _shrunk(gradient, ctx.traffic.size), None, None


class _Scatter(torch.autograd.Function):
    """A whole to the own part, of the sum over ranks if they have parts of that (`summed`); backward gathers."""

    @staticmethod
    def forward(ctx, full: Tensor, traffic: TensorTraffic, summed: bool) -> Tensor:
        ctx.traffic = traffic
        if summed:
            traffic.reduce_scatter(full)
        return _shrunk(full, traffic.size)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        full = _grown(gradient, ctx.traffic.size)
        ctx.traffic.all_gather(full)
        return full, None, None


class _Enter(torch.autograd.Function):
    """The same on the way there; backward sums over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, traffic: TensorTraffic) -> Tensor:
        ctx.traffic = traffic
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.traffic.all_reduce(gradient)
        return gradient, None


class _Leave(torch.autograd.Function):
    """Sums over ranks, in place; the same on the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, traffic: TensorTraffic) -> Tensor:
        traffic.all_reduce(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


class _GatheredProduct(torch.autograd.Function):
    """Part of the tokens (t, ..., in) by a weight (out, in), for all tokens: keeps the part, and gathers again
    backward, for a weight that is trained.
    """

    @staticmethod
    def forward(ctx, part: Tensor, weight: Tensor, traffic: TensorTraffic) -> Tensor:
        ctx.save_for_backward(part if ctx.needs_input_grad[1] else None, weight)
        ctx.traffic = traffic
        full = _grown(part, traffic.size)
        traffic.all_gather(full)
        return full @ weight.t()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        part, weight = ctx.saved_tensors
        full = None
        if part is not None:
            full = _grown(part, ctx.traffic.size)
            ctx.traffic.all_gather(full)
        of_input = gradient @ weight
        ctx.traffic.reduce_scatter(of_input)
        of_weight = None if full is None else gradient.flatten(0, -2).t() @ full.flatten(0, -2)
        return _shrunk(of_input, ctx.traffic.size), of_weight, None


class _MeteredRegion:
    def __init__(self, traffic: TensorTraffic):
        self.traffic = traffic

    def scatter(self, full: Tensor) -> Tensor:
        return _Scatter.apply(full, self.traffic, False)

    def gather(self, part: Tensor) -> Tensor:
        return _Gather.apply(part, self.traffic, False)

    def copy(self, full: Tensor) -> Tensor:
        return _Enter.apply(full, self.traffic)


class _Column(nn.Linear):
    def __init__(self, layers: MetaTPLayers, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features // layers.tensor_parallel_size, bias=bias)
        self.layers = [layers]  # not a sub-module

    def forward(self, x: Tensor) -> Tensor:
        layers = self.layers[0]
        if not layers.sequence_parallel:
            return super().forward(_Enter.apply(x, layers.traffic))
        product = _GatheredProduct.apply(x, self.weight, layers.traffic)
        return product if self.bias is None else product + self.bias


class _Row(nn.Linear):
    def __init__(self, layers: MetaTPLayers, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features // layers.tensor_parallel_size, out_features, bias=bias)
        self.layers = [layers]
        if bias and layers.sequence_parallel:
            mark_partial_parameter(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        layers, product = self.layers[0], x @ self.weight.t()
        if layers.sequence_parallel:
            total = _Scatter.apply(product, layers.traffic, True)
        else:
            total = _Leave.apply(product, layers.traffic)
        return total if self.bias is None else total + self.bias


class _VocabEmbedding(nn.Embedding):
    def __init__(self, layers: MetaTPLayers, vocab_size: int, width: int):
        super().__init__(vocab_size // layers.tensor_parallel_size, width)
        self.layers = [layers]

    def forward(self, codes: Tensor) -> Tensor:
        return _Leave.apply(super().forward(codes), self.layers[0].traffic)


class _VocabHead(_Column):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return super().forward(x)
        layers = self.layers[0]
        traffic = layers.traffic
        entered = _Gather.apply(x, traffic, True) if layers.sequence_parallel else _Enter.apply(x, traffic)
        return head_cross_entropy(entered, self.weight, targets, join=self._join)

    def _join(self, totals: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(3):  # a maximum and two sums
            self.layers[0].traffic.all_reduce(totals)
        return totals, picked


class MetaTPLayers(TensorParallelLayers):
    """What a tensor rank of `size` gets from `parallel.megatron.MegatronLayers`, in shapes and traffic.

    Values mean nothing, so the networks built with it run on the meta device. Sizes must be divisible, as recipes see
    to.
    """

    def __init__(self, size: int, *, sequence_parallel: bool = False):
        super().__init__(0, size, sequence_parallel=sequence_parallel)
        self.traffic = TensorTraffic(size)
        self.images = _MeteredRegion(self.traffic)
        self.tokens = _MeteredRegion(self.traffic) if sequence_parallel else REPLICATED_REGION

    def column(self, in_features: int, out_features: int, *, bias: bool, groups: int = 1) -> nn.Module:
        return declared(_Column(self, in_features, out_features, bias), column_shards(bias=bias, groups=groups))

    def row(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        return declared(_Row(self, in_features, out_features, bias), row_shards())

    def vocab_embedding(self, vocab_size: int, width: int) -> nn.Module:
        return _VocabEmbedding(self, vocab_size, width)

    def vocab_head(self, width: int, vocab_size: int) -> nn.Module:
        return _VocabHead(self, width, vocab_size, False)

    def full_features(self, part: Tensor) -> Tensor:
        full = part.new_empty((*part.shape[:-1], part.shape[-1] * self.tensor_parallel_size))
        self.traffic.all_gather(full)
        return full

    def mean_over_data(self, x: Tensor) -> Tensor:
        return x

    def image_mean(self, *, all_data: bool) -> None:
        return None
