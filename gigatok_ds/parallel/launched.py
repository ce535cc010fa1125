"""Which rank this process is, for work that ranks share without talking to each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gigatok_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LaunchedRank:
    """This process's place among `world_size` ranks, and among those of its host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def device(self, kind: str) -> torch.device:
        """The device of `kind`: "cpu", "cuda" for this rank's own GPU, or one by name ("cuda:1").

        Raises InputError for another name, or when the host has fewer GPUs than ranks.
        """
        try:
            device = torch.device(kind)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise InputError(f"device {kind!r} is not known; choose cpu or cuda")
        if device.type == "cpu":
            return device
        index = self.local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise InputError(
                f"rank {self.rank} would use GPU {index} of its host and sees "
                f"{torch.cuda.device_count()}; start one rank for each GPU and let every rank see all GPUs"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        return device


def launched_rank(environment: Mapping[str, str] = os.environ) -> LaunchedRank:
    """The rank that a launcher describes by RANK, WORLD_SIZE and LOCAL_RANK; a single one without RANK.

    Raises InputError when they contradict each other.
    """
    if "RANK" not in environment:
        return LaunchedRank()
    values = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if not all(value.isdecimal() for value in values.values()):
        raise InputError(f"the environment describes a rank in part: {values}; let a launcher (torchrun, say) set all "
                         "of them, or unset RANK")
    rank, world_size, local_rank = map(int, values.values())
    if rank >= world_size:
        raise InputError(f"RANK is {rank}, but WORLD_SIZE is {world_size}; ranks are counted from 0")
    return LaunchedRank(rank=rank, world_size=world_size, local_rank=local_rank)
