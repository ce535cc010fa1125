"""Are tensors that several ranks hold alike still so, bit for bit? Memory, links and GPUs that fail do not always say
so.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gigatok_ds.errors import MachineError
from gigatok_ds.parallel.topology import Topology

CHUNK = 1 << 22  # elements looked at in one go


class Replicated(NamedTuple):
    """A tensor of which the ranks of a data group, or of a tensor group, or of both, hold the same."""

    name: str
    tensor: Tensor
    over_data: bool
    over_tensor: bool


def compare_replicas(tensors: Iterable[Replicated], topology: Topology) -> None:
    """Raise MachineError, on all ranks, naming the first tensor that differs and the ranks that hold another.
    Collective.
    """
    if topology.world_size == 1:
        return
    # One after the other: each may be whole only until the next is asked for.
    sums = [(item, checksum(item.tensor)) for item in tensors]
    found = []
    for group, size, chosen in (
            (topology.data_group, topology.data_size, [(item.name, total) for item, total in sums if item.over_data]),
            (topology.tensor_group, topology.tensor_size,
             [(item.name, total) for item, total in sums if item.over_tensor])):
        if size > 1 and chosen:
            differing = outsiders(torch.stack([total for _, total in chosen]), group, size)
            found += [(chosen[index][0], places, group) for index, places in differing]
    first = [(name, places, dist.get_process_group_ranks(group)) for name, places, group in found[:1]]
    everywhere = topology.gather_objects((first, len(found), socket.gethostname()))
    hosts = [host for _, _, host in everywhere]
    for first, count, _ in everywhere:
        for name, places, ranks in first:
            raise MachineError(_text(name, [ranks[place] for place in places], ranks, count, hosts))


def outsiders(sums: Tensor, group: Any, size: int) -> list[tuple[int, list[int]]]:
    """(index of a tensor, places in the group of those that hold another than most) of each that differs.

    sums: the tensors' checksums. Collective.
    """
    gathered = [torch.empty_like(sums) for _ in range(size)]
    dist.all_gather(gathered, sums, group=group)
    table = torch.stack(gathered, 1).tolist()
    found = []
    for index, row in enumerate(table):
        usual, votes = Counter(row).most_common(1)[0]
        if votes < size:
            # Without a majority nobody knows who is right.
            found.append((index, [place for place, value in enumerate(row) if value != usual or 2 * votes <= size]))
    return found


def _text(name: str, differing: list[int], ranks: list[int], count: int, hosts: list[str]) -> str:
    more = f" (and {count - 1} more)" if count > 1 else ""
    who = ", ".join(f"{rank} (host {hosts[rank]})" for rank in differing)
    others = [rank for rank in ranks if rank not in differing]
    if not others:
        return f"{name}{more} should be alike on ranks {who}, but is not: memory, a GPU or a link is faulty"
    return (
        f"{name}{more} on rank{'s' * (len(differing) > 1)} {who} is not what ranks {', '.join(map(str, others))} hold: "
        "memory, a GPU or a link is faulty there; leave that host out"
    )


def checksum(tensor: Tensor) -> Tensor:
    """An integer (int64, on the tensor's device) that changes when a bit changes or values change places.

    The sum over elements of their bits times an odd number that depends on the place, modulo 2^64.
    """
    bits = tensor.detach().contiguous().view(-1)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()]
    bits = bits.view(kind)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start:start + CHUNK].long()
        places = torch.arange(2 * start + 1, 2 * (start + part.numel()) + 1, 2, device=bits.device)
        total += ((part + 1) * places).sum()
    return total
