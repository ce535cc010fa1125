"""Activation checkpointing: which modules forget their activations and compute them again in the backward pass.

A module class that is worth it says what it is in its attribute `recompute_unit`: "block" (a transformer layer) or
"cnn" (a residual block).
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_(network: nn.Module, *, every_block: int = 0, cnn: bool = False) -> int:
    """Recompute every n-th transformer block (0: none, 1: all) and, if asked, the CNN's residual blocks.

    Blocks are counted in the order of the network's modules. Returns how many modules recompute.
    """
    blocks = [module for module in network.modules() if getattr(module, "recompute_unit", None) == "block"]
    chosen = blocks[every_block - 1 :: every_block] if every_block else []
    if cnn:
        chosen += [module for module in network.modules() if getattr(module, "recompute_unit", None) == "cnn"]
    for module in chosen:
        # Inside the module's call, so that hooks which gather its parameters under ZeRO-3 run once.
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return len(chosen)
