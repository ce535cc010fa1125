"""All that is changed in other libraries while they run; `tests/repository/test_compat.py` fails when a change is
needed no more.

Each says the version that was seen to need it, and where its makers speak of it.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection
from types import ModuleType
from typing import Any

_sockets = itertools.count()  # of this process


@contextmanager
def without_wandb() -> Iterator[None]:
    """What is imported within does not find wandb, unless it is imported already.

    timm (1.0.31) and megatron-core (0.16.1) import it wherever it is installed: a second, and directories for its media
    in TMPDIR, which stay when the process is killed.
    """
    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # how Python spells "not to be found"
    try:
        yield
    finally:
        if hidden:
            del sys.modules["wandb"]


@functools.cache
def timm_library() -> ModuleType:
    """timm, imported without wandb."""
    with without_wandb():
        import timm
    return timm


def current_device_without_gpus() -> None:
    """Take the CPU for the current CUDA device, on a machine without GPUs.

    Megatron-core's layers (0.16.1) ask for it whatever their tensors are on (Megatron-LM pull request 6270).
    """
    import torch

    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]


def compiled_versions(most: int) -> None:
    """torch.compile keeps at least `most` versions of a function: blocks of different shapes count as such.

    torch (2.14.1) gives up after eight and runs the rest eagerly; a setting of its own.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, most)


def sockets_without_files() -> None:
    """What multiprocessing listens on in this process has a name without a file.

    A data worker hands tensors over by a socket, of which Python (3.11) makes a file: a killed worker would leave it;
    and names may meet (pytorch issue 76373).
    """
    connection.arbitrary_address = lambda family: f"\0gigatok-ds-{os.getpid()}-{next(_sockets)}"  # type: ignore[attr-defined]


def no_shared_memory_op(deepspeed: ModuleType) -> None:
    """DeepSpeed (0.19.8) would compile an all-reduce over shared memory that only inference uses, and fail without
    ninja (its issue 1687 is of the same kind).
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def search_at_lowest_scale(optimizer: Any) -> None:
    """An fp16 loss scale at its minimum stays there.

    DeepSpeed (0.19.8, since its pull request 1958) raises an Exception. How many steps in a row may be left out is the
    step guard's to say, in one line.
    """
    if getattr(getattr(optimizer, "loss_scaler", None), "raise_error_at_min_scale", False):
        optimizer.loss_scaler.raise_error_at_min_scale = False
