"""torch.compile of a network's repeated parts: transformer layers and residual blocks, one at a time.

Those are the modules that say what they are in `recompute_unit`. Compiling their inside, and not the whole network,
keeps compilation short (equal blocks share it), and leaves outside what DeepSpeed and activation checkpointing do
around a module's call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from gigatok_ds.errors import InputError
from gigatok_ds.kernels import build
from gigatok_ds.parallel.dropout import leave_out_of_graphs

# Blocks of different shapes count as versions of one function; torch would give up compiling it after eight.
VERSIONS = 128


def compile_of(mode: str, device: torch.device, settings: dict) -> Callable[[nn.Module], list[nn.Module]] | None:
    """What compiles a network as `training.compile` says, under these DeepSpeed settings; None for "none"."""
    if mode == "none":
        return None
    return partial(compile_, mode=mode, device=device, stage=settings["zero_optimization"]["stage"])


def compile_(network: nn.Module, mode: str, device: torch.device, *, stage: int) -> list[nn.Module]:
    """Compile the inside of every block, when it first runs; returns those modules.

    `mode` is torch.compile's. At ZeRO `stage` 3 residual blocks stay eager: DeepSpeed 0.19.8 counts gradients of what is
    gathered as a whole once per call, and the CNN decoder may be called twice. Call it before `recompute_`. Raises
    InputError when the CPU code that torch would generate cannot be compiled.
    """
    if device.type == "cpu" and not build.compiler():
        raise InputError(f"training.compile is {mode}, for which a C++ compiler is needed and there is none; install "
                         "g++, set CXX, or use training.compile=none")
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VERSIONS)
    units = ("block",) if stage == 3 else ("block", "cnn")
    blocks = [module for module in network.modules() if getattr(module, "recompute_unit", None) in units]
    leave_out_of_graphs()
    for block in blocks:
        block.forward = torch.compile(block.forward, mode=mode, dynamic=False)
    return blocks
