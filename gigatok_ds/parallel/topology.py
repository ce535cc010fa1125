"""Who am I among the ranks: the process group, and this rank's place in it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Topology:
    """This process's rank and device. Data ranks choose samples; with one tensor rank they are all ranks."""

    rank: int
    world_size: int
    device: torch.device
    data_rank: int
    data_size: int

    @property
    def is_first(self) -> bool:
        """The rank that writes logs and metadata."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def gather_data(self, tensor: Tensor) -> Tensor:
        """Concatenate equally shaped tensors of all data ranks along the first axis, in rank order."""
        if self.data_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.data_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def mean_over_data(self, tensor: Tensor) -> Tensor:
        if self.data_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.data_size
        return tensor

    def from_first(self, value):
        """The first rank's `value` (any plain Python object) on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def start_process_group() -> Topology:
    """Join the process group that the launcher describes in the environment, or start one of a single process.

    NCCL on GPUs, gloo on CPUs.
    """
    cuda = torch.cuda.is_available()
    launched = all(name in os.environ for name in _LAUNCHED)
    local_rank = int(os.environ["LOCAL_RANK"]) if launched else 0
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if launched:
            dist.init_process_group(backend)
        else:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it even in a single process
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return Topology(rank=rank, world_size=world_size, device=device, data_rank=rank, data_size=world_size)


def stop_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
