"""What must hold between ranks before a network trains. Each of these was seen to train wrongly without an error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gigatok_ds.parallel.drift import checksum, outsiders
from gigatok_ds.parallel.sharding import declared_shards
from gigatok_ds.parallel.topology import Topology

# A context in which a parameter that is spread over data ranks is whole.
Gathered = Callable[[nn.Parameter], AbstractContextManager[Any]]


class LayoutError(RuntimeError):
    """A network is not spread over the ranks as it should be: a defect of the program, not of its input."""


def check_spread(network: nn.Module, topology: Topology, full: Gathered) -> None:
    """Check marks, partition groups and replicas of a network under tensor parallelism. Collective.

    Raises LayoutError naming the parameter.
    """
    if topology.tensor_size == 1:
        return
    shards = declared_shards(network)
    data_ranks = dist.get_process_group_ranks(topology.data_group)
    for name, parameter in network.named_parameters():
        if name in shards and not getattr(parameter, "tensor_model_parallel", False):
            raise LayoutError(f"{name} is cut over tensor ranks but has lost its mark: "
                              "the gradient norm would be wrong")
        group = getattr(parameter, "ds_process_group", None)
        if group is not None and dist.get_process_group_ranks(group) != data_ranks:
            raise LayoutError(f"{name} is partitioned over ranks {dist.get_process_group_ranks(group)}, not over its "
                              f"data ranks {data_ranks}: different parts of the model would be mixed")
    differing = _differing_replicas(network, topology, full)
    if differing:
        raise LayoutError(f"{differing[0]} (and {len(differing) - 1} more) should be alike on all tensor ranks, "
                          "but is not")


def _differing_replicas(network: nn.Module, topology: Topology, full: Gathered) -> list[str]:
    shards = declared_shards(network)
    names = [name for name, _ in network.named_parameters() if name not in shards]
    sums = []
    for name in names:
        with full(parameter := network.get_parameter(name)):
            sums.append(checksum(parameter))
    return [names[index] for index, _ in outsiders(torch.stack(sums), topology.tensor_group, topology.tensor_size)]

