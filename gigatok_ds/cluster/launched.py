"""Which rank this process is, as its launcher says in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from gigatok_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LaunchedRank:
    """This process's place among `world_size` ranks, and among the `local_size` ranks of its host.

    rendezvous: whether the environment also says where ranks meet, so that they can talk to each other.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    rendezvous: bool = False

    @property
    def is_alone(self) -> bool:
        return self.world_size == 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_first_of_host(self) -> bool:
        return self.local_rank == 0


ALONE = LaunchedRank()


def launched_rank(environment: Mapping[str, str] = os.environ) -> LaunchedRank:
    """The rank that RANK, WORLD_SIZE and LOCAL_RANK describe; a single one without RANK.

    How many ranks a host has is LOCAL_WORLD_SIZE for torchrun and LOCAL_SIZE for DeepSpeed's launcher; all of them
    without either. Raises InputError when they contradict each other.
    """
    if "RANK" not in environment:
        return ALONE
    values = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    local_size = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or values["WORLD_SIZE"]
    if not all(value.isdecimal() for value in (*values.values(), local_size)):
        raise InputError(f"the environment describes a rank in part: {values}; let a launcher (torchrun, say) set all "
                         "of them, or unset RANK")
    rank, world_size, local_rank = map(int, values.values())
    if rank >= world_size:
        raise InputError(f"RANK is {rank}, but WORLD_SIZE is {world_size}; ranks are counted from 0")
    return LaunchedRank(rank=rank, world_size=world_size, local_rank=local_rank, local_size=int(local_size),
                        rendezvous=all(name in environment for name in ("MASTER_ADDR", "MASTER_PORT")))


def launched_rank_or_alone() -> LaunchedRank:
    """The rank for messages and the process's end: a description that contradicts itself is told elsewhere."""
    try:
        return launched_rank()
    except InputError:
        return ALONE
