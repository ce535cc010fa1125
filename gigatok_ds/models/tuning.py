"""What training changes of a network: all of it, some of its parts, or low-rank adapters beside a GPT's projections.

Low-rank adaptation (LoRA: Hu et al. 2021, arXiv:2106.09685) leaves the weight W (out, in) of a projection as it is,
and trains A (rank, in) and B (out, rank) beside it: y = W x + alpha / rank * B A x. B is zero at first. Adapters are
made of the layers that the network is made of: where W is cut by outputs so is B, and where it is cut by inputs so is
A. The other one is whole on all tensor ranks, which exchange `rank` features for each token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from gigatok_ds.config.lora import LoRAConfig
from gigatok_ds.config.model import GPTConfig
from gigatok_ds.config.recipe import TrainingConfig
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.initialisation import Fill, constant, uniform
from gigatok_ds.parallel.layers import PLAIN, Layers

Network = TypeVar("Network", bound=nn.Module)

_NO_DROPOUT = "quantizer"  # what it does in training is to let a failed latent pass, for the loop to see
_ADAPTER = "lora"  # the attribute of a projection that has one


def tune_(network: Network, training: TrainingConfig, layers: Layers = PLAIN) -> Network:
    """Make the network what its training has: with the adapters of `training.lora`, made of `layers`, and all else
    frozen but for the parts to train beside them; or with the parts of `training.freeze` frozen. Returns it.
    """
    if training.lora is None:
        return freeze_(network, training.freeze)
    assert isinstance(network, GPT), "recipes of tokenizers have no adapters"
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] in training.lora.train)
    adapt_(network, training.lora, layers)
    return network


def freeze_(network: Network, parts: Sequence[str]) -> Network:
    """Freeze all parameters whose names begin with one of `parts`, attributes of the network, and return it."""
    for name, parameter in network.named_parameters():
        if name.partition(".")[0] in parts:
            parameter.requires_grad_(False)
    for name in parts:
        part = getattr(network, name)
        if isinstance(part, nn.Module) and name != _NO_DROPOUT:
            part.eval()
            part.train = partial(_stays, part)  # type: ignore[method-assign]
    return network


def _stays(part: nn.Module, mode: bool = True) -> nn.Module:
    """Leave the part in evaluation, whatever the network around it is put into."""
    return part


class LowRankAdapter(nn.Module):
    """B A x (..., out) of x (..., in), which `scale` is still to be applied to.

    A starts uniform within 1 / sqrt(in), as torch's linear layers do by themselves; B starts at zero.
    """

    def __init__(self, into: nn.Module, out_of: nn.Module, inputs: int, scale: float):
        """into: A, the projection of so many inputs to `rank` features; out_of: B."""
        super().__init__()
        self.A, self.B = into, out_of
        self.inputs, self.scale = inputs, scale

    def init_fn(self, name: str) -> Fill:
        return uniform(self.inputs**-0.5) if name == "A.weight" else constant(0.0)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.B(self.A(x))
        return product


class _Projection(NamedTuple):
    """One of a block's, of `groups` packed ones; cut over tensor ranks by inputs or else by outputs."""

    name: str
    inputs: int
    outputs: int
    groups: int = 1
    by_inputs: bool = False


def _projections(config: GPTConfig) -> dict[str, tuple[_Projection, ...]]:
    """What `training.lora.layers` may name, and the projections (models.gpt) that it stands for."""
    width, hidden = config.transformer.width, config.ffn_width
    return {
        "attention": (_Projection("attention.wqkv", width, 3 * width, groups=3),
                      _Projection("attention.wo", width, width, by_inputs=True)),
        "ffn": (_Projection("feed_forward.w1", width, hidden), _Projection("feed_forward.w3", width, hidden),
                _Projection("feed_forward.w2", hidden, width, by_inputs=True)),
    }


def adapt_(network: GPT, lora: LoRAConfig, layers: Layers = PLAIN) -> GPT:
    """Put adapters, made of the network's own `layers`, beside projections of every block; returns the network.

    Their weights are `NAME.lora.A.weight` and `NAME.lora.B.weight` for a projection's `NAME.weight`.
    """
    for block in network.layers:
        for kind in lora.layers:
            for projection in _projections(network.config)[kind]:
                owner = block.get_submodule(projection.name)
                plain: Any = type(owner)
                owner.add_module(_ADAPTER, _adapter(projection, lora, layers))
                owner.__class__ = _adapted(plain)
    return network


def _adapter(projection: _Projection, lora: LoRAConfig, layers: Layers) -> LowRankAdapter:
    into: nn.Module
    out_of: nn.Module
    if projection.by_inputs:
        into = layers.row(projection.inputs, lora.rank, bias=False)
        out_of = layers.per_token(nn.Linear(lora.rank, projection.outputs, bias=False))
    else:
        into = layers.per_token(nn.Linear(projection.inputs, lora.rank, bias=False))
        out_of = layers.column(lora.rank, projection.outputs, bias=False, groups=projection.groups)
    return LowRankAdapter(into, out_of, projection.inputs, lora.scale)


@functools.cache
def _adapted(kind: type[Any]) -> type[Any]:
    """The class of projections of that kind with adapters. A class, so that equal blocks share what is compiled."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        adapter = cast("LowRankAdapter", self.lora)
        return torch.add(kind.forward(self, x), adapter(x), alpha=adapter.scale)

    return type(f"Adapted{kind.__name__}", (kind,), {"forward": forward})


def is_adapters(name: str) -> bool:
    """Whether the parameter of that name is one of an adapter."""
    return f".{_ADAPTER}." in name


def adapter_names(name: str) -> tuple[str, str]:
    """The names of A and B beside a projection's weight of that name."""
    owner = name.rpartition(".")[0]
    return f"{owner}.{_ADAPTER}.A.weight", f"{owner}.{_ADAPTER}.B.weight"


def merged_weight(weight: Tensor, into: Tensor, out_of: Tensor, scale: float) -> Tensor:
    """W + scale * B A (out, in) in W's type, computed in float64, for A = `into` (rank, in), B = `out_of` (out, rank).
    """
    return (weight.double() + scale * (out_of.double() @ into.double())).to(weight.dtype)
