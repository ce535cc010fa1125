"""How long a collective may take: longer than a run's watchdog lets a rank stand still; it writes down why, and ends
all.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

# From the moment that a rank has stalled: until every rank has written its stacks, the first one has told, and all have
# ended.
MARGIN = timedelta(minutes=2)
NEVER = timedelta(days=365)


def collective_timeout(stall_seconds: float | None) -> timedelta:
    """The timeout of the process groups of a run with that monitor.stall_seconds."""
    return NEVER if stall_seconds is None else timedelta(seconds=stall_seconds) + MARGIN


def outlast_watchdog(stall_seconds: float | None) -> None:
    """Give every process group of this process that timeout, those included that DeepSpeed and Megatron have made:
    torch's own are ten minutes for NCCL and half an hour for gloo, and each would end a long validation."""
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # torch 2.11 has the latter
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(collective_timeout(stall_seconds), group)
