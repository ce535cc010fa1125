"""How much memory a training process takes."""

from __future__ import annotations

import resource
import sys

import torch

from gigatok_ds.config.recipe import Recipe

GB = 1e9


def peak_memory(device: torch.device) -> float:
    """Most memory this process has held so far, in GB (1e9 bytes): the GPU's, or without one the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB


def memory_line(peak: float, stage: int, recipe: Recipe) -> str:
    """One line for the log: the peak of the fullest rank, and which settings decide it."""
    parallel = recipe.parallel
    every = parallel.recompute_every
    counted = {0: "no transformer block", 1: "every transformer block"}
    recomputed = counted.get(every, f"one in {every} transformer blocks")
    if getattr(parallel, "recompute_cnn", False):
        recomputed += " and the CNN"
    sequence = ", sequence parallel" if parallel.sequence else ""
    return (f"memory: {peak:.2f} GB at most on any rank (ZeRO stage {stage}, {parallel.tensor} tensor ranks{sequence}, "
            f"activations recomputed in {recomputed})")
