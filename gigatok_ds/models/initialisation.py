"""Initial weights, addressed by parameter name.

A network's constructors leave torch's defaults; `initialise_` then gives every parameter the value that a stream of
(seed, parameter name) draws for it, so that neither the order of construction nor how parameters are spread over
ranks changes where training starts. A module that wants something else than its leaves' defaults has a method
`init_fn(name)`, asked for the parameters below it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from gigatok_ds.parallel.sharding import declared_shards
from gigatok_ds.streams import torch_stream

# Fills a full (not sharded) tensor in place, drawing from the generator; nobody asks for what it returns.
Fill = Callable[[Tensor, torch.Generator], object]


def normal(std: float) -> Fill:
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def truncated_normal(std: float) -> Fill:
    return lambda tensor, generator: nn.init.trunc_normal_(tensor, std=std, generator=generator)


def uniform(bound: float) -> Fill:
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)


def constant(value: float) -> Fill:
    return lambda tensor, generator: tensor.fill_(value)


def default_fill(network: nn.Module, name: str) -> Fill:
    """Ones for norm weights, zeros for biases; anything else has to be said by a module above it."""
    if name.endswith("bias"):
        return constant(0.0)
    owner = network.get_submodule(name.rpartition(".")[0])
    if "Norm" in type(owner).__name__ and name.endswith("weight"):
        return constant(1.0)
    raise AssertionError(f"no initial value is defined for {name}")


def initial_fills(network: nn.Module) -> Iterator[tuple[str, nn.Parameter, Fill]]:
    """Name, parameter and fill of every parameter; the innermost module that has an opinion decides."""
    modules = dict(network.named_modules())
    for name, parameter in network.named_parameters():
        path = name.split(".")
        opinions = (
            modules[".".join(path[:depth])].init_fn(".".join(path[depth:]))
            for depth in range(len(path) - 1, -1, -1)
            if hasattr(modules[".".join(path[:depth])], "init_fn")
        )
        fill = next((opinion for opinion in opinions if opinion is not None), None)
        yield name, parameter, fill or default_fill(network, name)


@torch.no_grad()
def initialise_(network: nn.Module, seed: int, *, tensor_rank: int = 0, tensor_size: int = 1,
                full: Callable[[nn.Parameter], AbstractContextManager[Any]] | None = None) -> nn.Module:
    """Give every parameter its initial value and return the network.

    `full(parameter)` is a context in which the parameter has its full shape, for parameters spread over data ranks.
    Of parameters that are cut over `tensor_size` tensor ranks, the network holds the part of `tensor_rank`.
    """
    full = full or contextlib.nullcontext
    shards = declared_shards(network)
    for name, parameter, fill in initial_fills(network):
        with full(parameter):
            shard = shards.get(name)
            value = torch.empty(shard.full_shape(parameter.shape, tensor_size) if shard else parameter.shape)
            fill(value, torch_stream(seed, "weights", name))
            parameter.copy_(shard.shard(value, tensor_rank, tensor_size) if shard else value)
    return network
