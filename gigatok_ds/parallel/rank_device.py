"""The device of a rank, for work that ranks share without talking to each other."""

from __future__ import annotations

import torch

from gigatok_ds.cluster.launched import LaunchedRank
from gigatok_ds.errors import InputError


def rank_device(rank: LaunchedRank, kind: str) -> torch.device:
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
    index = rank.local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise InputError(
            f"rank {rank.rank} would use GPU {index} of its host and sees "
            f"{torch.cuda.device_count()}; start one rank for each GPU and let every rank see all GPUs"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device
