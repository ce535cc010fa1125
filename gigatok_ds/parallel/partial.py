"""Replicated parameters that each tensor rank applies to a part of the data only.

Their gradients are partial sums: the whole gradient is the sum over tensor ranks. Which parameters these are is marked
where the module is built; the sum is hooked into the backward pass before DeepSpeed sees the gradient.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

_MARK = "partial_over_tensor_ranks"


def mark_partial(module: Network) -> Network:
    """Mark every parameter of `module` as applied to this tensor rank's part of the data only."""
    for parameter in module.parameters():
        mark_partial_parameter(parameter)
    return module


def mark_partial_parameter(parameter: nn.Parameter) -> None:
    setattr(parameter, _MARK, True)


def is_partial(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, _MARK, False))


def sum_partial_gradients(network: nn.Module, group: dist.ProcessGroup) -> int:
    """Sum the gradients of the marked parameters over `group` in every backward pass; returns their number."""

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=group)
        return gradient

    partial = [parameter for parameter in network.parameters() if is_partial(parameter) and parameter.requires_grad]
    for parameter in partial:
        parameter.register_hook(summed)
    return len(partial)
