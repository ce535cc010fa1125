"""torch's types by the names that recipes and commands give them, and what the hardware makes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in PRECISIONS.items()}


@contextlib.contextmanager
def float32_arithmetic(*, tf32: bool = False) -> Iterator[None]:
    """Inside, float32 products and convolutions on GPUs round their factors to 10 bits (TF32) both, or neither does.

    torch's own default is to round in convolutions only.
    """
    # Both make up what they have when they are asked for it.
    settings: tuple[Any, Any] = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    try:
        for setting in settings:
            setting.allow_tf32 = tf32
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def device_has_bf16() -> bool:
    """Whether there is a GPU that computes in bfloat16 itself."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def wide_half(device: torch.device) -> torch.dtype:
    """The type that products take half precision in on a device without leaving the range of float32: bfloat16, or
    float32 on a GPU that has none."""
    return torch.float32 if device.type == "cuda" and not device_has_bf16() else torch.bfloat16


def precision_note(precision: str, has_bf16: bool) -> str | None:
    """What to say about fp16, in which the recipes were published; None about anything else."""
    if precision != "fp16" or not has_bf16:
        return None
    return ("this recipe trains in fp16, as published; this GPU has bfloat16, whose range needs no loss scaling: "
            "training.precision=bf16 is the safer choice")
