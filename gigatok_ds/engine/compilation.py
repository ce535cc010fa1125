"""torch.compile of a network's repeated parts: transformer layers and residual blocks, one at a time.

Those are the modules that say what they are in `recompute_unit`, and others that say `compiles`. Compiling their
inside, and not the whole network, keeps compilation short (equal blocks share it), and leaves outside what DeepSpeed
and activation checkpointing do around a module's call. Layers that tensor ranks share stay as they are, and with them
all that is sent: they say `outside_graphs`, and what lies between them is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from gigatok_ds.compat import compiled_versions
from gigatok_ds.config.recipe import Recipe, TokenizerRecipe
from gigatok_ds.errors import InputError
from gigatok_ds.kernels import build

VERSIONS = 128  # of a function: blocks of different shapes


def compile_of(mode: str, device: torch.device, settings: dict[str, Any], *,
               twice: str | None = None) -> Callable[[nn.Module], list[nn.Module]] | None:
    """What compiles a network as `training.compile` says, under these DeepSpeed settings; None if nothing does.

    `twice` names a part of the network that a pass may call more than once.
    """
    if (chosen := chosen_mode(mode, device)) is None:
        return None
    return partial(compile_, mode=chosen, device=device, stage=settings["zero_optimization"]["stage"], twice=twice)


def chosen_mode(mode: str, device: torch.device) -> str | None:
    """torch.compile's mode for a `training.compile`, or None: "auto" compiles on GPUs wherever that is possible."""
    if mode != "auto":
        return None if mode == "none" else mode
    return "default" if device.type == "cuda" and missing(device) is None else None


def missing(device: torch.device) -> str | None:
    """What torch.compile needs for this device and does not find."""
    if not build.compiler():
        return "a C++ compiler"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton for this GPU"
    return None


def called_twice(recipe: Recipe) -> str | None:
    """The part of its network that a pass may call twice: with the direct reconstruction, a tokenizer's CNN decoder."""
    return "cnn_decoder" if isinstance(recipe, TokenizerRecipe) and recipe.loss.auxiliary else None


def left_eager(recipe: Recipe, device: torch.device, settings: dict[str, Any]) -> list[str]:
    """What `training.compile` would compile and does not, and why: a line each."""
    asked = recipe.training.compile
    if asked == "auto" and device.type == "cuda" and (lacking := missing(device)):
        return [f"training.compile is auto, but there is no {lacking}: nothing is compiled"]
    if chosen_mode(asked, device) and called_twice(recipe) and settings["zero_optimization"]["stage"] == 3:
        return ["training.compile leaves the CNN decoder as it is: ZeRO-3 counts gradients of a block that is "
                "gathered as a whole once a step, but loss.auxiliary calls the decoder twice; use ZeRO 2, or "
                "loss.auxiliary=null"]
    return []


def parts_of(network: nn.Module) -> list[nn.Module]:
    """The modules of a network that are compiled, each for itself."""
    return [module for module in network.modules() if hasattr(module, "recompute_unit")
            or getattr(module, "compiles", False)]


def compile_(network: nn.Module, mode: str, device: torch.device, *, stage: int,
             twice: str | None = None) -> list[nn.Module]:
    """Compile the inside of every block, when it first runs; returns those modules.

    `mode` is torch.compile's. At ZeRO `stage` 3 blocks of `twice` stay eager: DeepSpeed 0.19.8 reduces gradients of
    what is gathered as a whole at each of its backward calls, and expects one in a step (`reduce_leaf_module_grads`).
    Call it before `recompute_`. Raises InputError when the code that torch would generate cannot be compiled.
    """
    if lacking := missing(device):
        raise InputError(f"training.compile is {mode}, for which {lacking} is needed and there is none; install "
                         f"{'g++, set CXX' if 'C++' in lacking else 'it'}, or use training.compile=none")
    compiled_versions(VERSIONS)
    eager = set(network.get_submodule(twice).modules()) if twice and stage == 3 else set()
    blocks = [module for module in parts_of(network) if module not in eager]
    for block in blocks:
        for module in block.modules():
            if getattr(module, "outside_graphs", False):
                module.forward = torch.compiler.disable(module.forward)
        block.forward = torch.compile(block.forward, mode=mode, dynamic=False)
    return blocks
