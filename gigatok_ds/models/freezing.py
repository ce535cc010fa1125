"""Parts of a network that training leaves as they are: no gradients, and no dropout in them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)

_NO_DROPOUT = "quantizer"  # what it does in training is to let a failed latent pass, for the loop to see


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
