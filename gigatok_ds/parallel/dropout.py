"""Dropout whose masks are addressed: whether a value is kept depends on where it is in the model and in the data.

A mask is a hash of (seed, layer, sample, token, feature), where a token may also be a pixel, or a head and a query. It
is the same on every layout of data, tensor and sequence parallelism, for every micro batch size, and when activations
are recomputed.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.cluster.share import WHOLE, Share
from gigatok_ds.kernels.addressed_dropout import addressed_dropout
from gigatok_ds.kernels.dropout_mask import dropped, rule_of
from gigatok_ds.streams import stream_key


class _Address(NamedTuple):
    seed: int
    samples: Tensor
    images: Tensor


# Not thread-local: autograd runs backward passes on threads of its own.
_address: _Address | None = None


@contextlib.contextmanager
def dropout_at(seed: int, samples: Tensor, images: Tensor | None = None) -> Iterator[None]:
    """Within, dropout draws for these samples: int64 (B,), each its own number in the whole course of training.

    images: those of them whose feature maps this rank computes, where tensor ranks share them out; None: all. Backward
    passes belong inside, since they may recompute activations.
    """
    before = _address
    _go_to(_Address(seed, samples, samples if images is None else images))
    try:
        yield
    finally:
        _go_to(before)


def _go_to(address: _Address | None) -> None:
    global _address
    _address = address
    if address:
        _give_rules(address.seed, address.samples)


class Dropout(nn.Module):
    """Dropout of (tokens, batch, features), of which this rank may hold only a part of tokens or features.

    Outside of `dropout_at` it is torch's own dropout, for those who train a whole model in a loop of their own.
    """

    per_sample = False

    def __init__(self, probability: float, *, tokens: Share = WHOLE, features: Share = WHOLE):
        super().__init__()
        self.probability, self.tokens, self.features = probability, tokens, features
        self.drops = probability > 0  # compiled code asks for this, and is the same for every probability
        self.layer: int | str | None = None
        # A tensor, so that layers differ in data only and share what is compiled; no buffer, which DeepSpeed would send
        # around.
        self.rule: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.drops):
            return x
        if _address is None:
            assert self.tokens == self.features == WHOLE, "dropout of a part needs dropout_at"
            return self._drop_anywhere(x)
        return self._drop(x, _address)

    def _drop(self, x: Tensor, address: _Address) -> Tensor:
        tokens, _, features = x.shape
        return self._drop_rows(x, address.samples, self.tokens.rank * tokens, self.features.rank * features)

    def _drop_rows(self, x: Tensor, samples: Tensor, token: int = 0, feature: int = 0) -> Tensor:
        """See `dropout_mask.dropped`."""
        assert self.rule is not None, "name_dropouts was not called on this model before dropout_at"
        # What is compiled holds the hash itself, which fuses into its neighbours.
        written_out = x.device.type == "cpu" or torch.compiler.is_compiling()
        return (dropped if written_out else addressed_dropout)(
            x, samples.to(x.device), self.rule.to(x.device), token, feature, self.per_sample)

    def _drop_anywhere(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.probability)

    def extra_repr(self) -> str:
        return f"p={self.probability}"


class DropPath(Dropout):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): drops a residual branch for a whole sample.

    The others are scaled up, so that the expectation stays. Every rank decides alike.
    """

    per_sample = True

    def _drop_anywhere(self, x: Tensor) -> Tensor:
        return x * F.dropout(x.new_ones(1, x.shape[1], 1), self.probability)


class AttentionDropout(Dropout):
    """Dropout of attention's probabilities (batch, heads, queries, keys), of which this rank may hold a part of the
    heads."""

    def __init__(self, probability: float, *, heads: Share = WHOLE):
        super().__init__(probability)
        self.heads = heads

    def _drop(self, x: Tensor, address: _Address) -> Tensor:
        first, among = self.heads.rank * x.shape[1], self.heads.size * x.shape[1]
        return self._drop_rows(x.reshape(1, -1, x.shape[3]), _rows(address.samples, x, first, among)).view(x.shape)


class MapDropout(Dropout):
    """Dropout of feature maps (batch, channels, height, width) of this rank's images.

    Two passes of a step, those of a reconstruction and of a direct one, drop the same.
    """

    def _drop(self, x: Tensor, address: _Address) -> Tensor:
        maps = x.permute(0, 2, 3, 1)
        rows = _rows(address.images, maps, 0, maps.shape[1])
        return self._drop_rows(maps.reshape(1, -1, maps.shape[3]), rows).view(maps.shape).permute(0, 3, 1, 2)


def _rows(samples: Tensor, x: Tensor, first: int, among: int) -> Tensor:
    """A number, int64, for each of the B x G x R rows of x (B, G, R, features).

    samples (B,) are the first axis; the second has the numbers from `first` on of `among`.
    """
    _, groups, rows, _ = x.shape
    group = torch.arange(first, first + groups, device=samples.device)
    row = torch.arange(rows, device=samples.device)
    return ((samples[:, None] * among + group)[..., None] * rows + row).flatten()


_named: weakref.WeakSet[Dropout] = weakref.WeakSet()
_rules: dict[tuple[int, int | str, float, torch.device], Tensor] = {}


def name_dropouts(network: nn.Module, name: str | None = None) -> None:
    """Number the network's dropouts in the order of its modules, so that each draws masks of its own.

    name: of a network that is computed beside another, whose dropouts have these numbers.
    """
    numbers = itertools.count()
    for module in network.modules():
        if isinstance(module, Dropout):
            number = next(numbers)
            module.layer = number if name is None else f"{name}.{number}"
            _named.add(module)


def _give_rules(seed: int, samples: Tensor) -> None:
    """Each numbered dropout gets its rule where the samples are. It is made once: a copy to a GPU makes the host wait.
    """
    real = type(samples) is Tensor  # no stand-in of a tensor is kept
    addresses = {module: (seed, module.layer, module.probability, samples.device)
                 for module in _named if module.layer is not None}
    missing = sorted({address for address in addresses.values() if not real or address not in _rules}, key=str)
    rules = _rules if real else {}
    if missing:
        table = [rule_of(stream_key(seed, "dropout", layer), probability) for _, layer, probability, _ in missing]
        # One tensor of 16 bytes for each: compiled code expects its inputs at multiples of them.
        rules.update(zip(missing, samples.new_tensor(table, dtype=torch.int32).unbind(), strict=True))
    for module, address in addresses.items():
        module.rule = rules[address]
