"""Dropout whose masks are addressed: whether a value is kept depends on where it is in the model and in the data.

A mask is a hash of (seed, layer, sample, token, feature). It is the same on every layout of data, tensor and sequence
parallelism, for every micro batch size, and when activations are recomputed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.streams import stream_key

_MASK = 0xFFFFFFFF
# Odd constants of full length; multiplying by one and folding the high half down mixes 32 bits.
_SAMPLE, _TOKEN, _FEATURE = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_MIX = (0x7FEB352D, 0x846CA68B)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part `rank` of `size` equal ones along an axis."""

    rank: int = 0
    size: int = 1


WHOLE = Part()


@dataclass(frozen=True, kw_only=True)
class _Address:
    seed: int
    samples: Tensor


_address: _Address | None = None


@contextlib.contextmanager
def dropout_at(seed: int, samples: Tensor) -> Iterator[None]:
    """Within, dropout draws for these samples: int64 (B,), each its own number in the whole course of training.

    Backward passes belong inside, since they may recompute activations.
    """
    global _address  # not thread-local: autograd runs backward passes on threads of its own
    before, _address = _address, _Address(seed=seed, samples=samples)
    try:
        yield
    finally:
        _address = before


class Dropout(nn.Module):
    """Dropout of (tokens, batch, features), of which this rank may hold only a part of tokens or features.

    Outside of `dropout_at` it is torch's own dropout, for those who train a whole model in a loop of their own.
    """

    def __init__(self, probability: float, *, tokens: Part = WHOLE, features: Part = WHOLE):
        super().__init__()
        self.probability, self.tokens, self.features = probability, tokens, features
        self.layer: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        return self._drop(x)

    def _drop(self, x: Tensor) -> Tensor:
        if _address is None:
            assert self.tokens == self.features == WHOLE, "dropout of a part needs dropout_at"
            return F.dropout(x, self.probability)
        assert self.layer is not None, "name_dropouts was not called on this model"
        tokens, _, features = x.shape
        seed = stream_key(_address.seed, "dropout", self.layer) & _MASK
        kept = keep_mask(self.probability, seed, _address.samples.to(x.device),
                         torch.arange(tokens, device=x.device) + self.tokens.rank * tokens,
                         torch.arange(features, device=x.device) + self.features.rank * features)
        return x * (kept.to(x.dtype) / (1 - self.probability))

    def extra_repr(self) -> str:
        return f"p={self.probability}"


class DropPath(Dropout):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): drops a residual branch for a whole sample.

    The others are scaled up, so that the expectation stays. Every rank decides alike.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        # One number per sample, wherever its tokens and features are.
        return x * super().forward(x.new_ones(1, x.shape[1], 1))


@functools.cache
def leave_out_of_graphs() -> None:
    """What torch.compile makes in this process calls dropouts, and does not hold them: a layer's number and the seed would become
    constants, and every layer would be compiled for itself."""
    Dropout._drop = torch.compiler.disable(Dropout._drop)


def name_dropouts(network: nn.Module) -> None:
    """Number the network's dropouts in the order of its modules, so that each draws masks of its own."""
    numbers = itertools.count()
    for module in network.modules():
        if isinstance(module, Dropout):
            module.layer = next(numbers)


def keep_mask(probability: float, seed: int, samples: Tensor, tokens: Tensor, features: Tensor) -> Tensor:
    """Whether to keep each of (T, B, W) values: bool, True with 1 - probability.

    samples (B,), tokens (T,) and features (W,) are int64 numbers of what lies along the axes.
    """
    row = _mixed(samples * _SAMPLE + (samples >> 32) * _TOKEN + seed)
    cell = _mixed(row + tokens[:, None] * _TOKEN)
    # From here on 32-bit numbers with a sign, whose products wrap around: half the memory traffic.
    value = _signed(cell)[..., None] ^ _signed(_mixed(features * _FEATURE))
    for factor in _MIX:
        value = (value ^ (value >> 16 & 0xFFFF)) * (factor - (1 << 32) if factor >> 31 else factor)
    value ^= value >> 15 & 0x1FFFF
    return value >= int(probability * 2**32) - 2**31


def _mixed(x: Tensor) -> Tensor:
    """A well-mixed 32-bit number, as int64, for each int64."""
    x = x & _MASK
    for factor in _MIX:
        x = (x ^ (x >> 16)) * factor & _MASK
    return x ^ (x >> 15)


def _signed(x: Tensor) -> Tensor:
    """32-bit numbers in int64 as int32 of the same bits."""
    return torch.where(x >= 2**31, x - 2**32, x).to(torch.int32)
