"""The decoding loop."""

from __future__ import annotations

import torch
from torch import Tensor

from gigatok_ds.errors import InputError
from gigatok_ds.models.gpt import GPT
from gigatok_ds.sampling.cache import make_caches
from gigatok_ds.sampling.choose import choose_codes
from gigatok_ds.sampling.guidance import guidance_scales, guide


def _check(gpt: GPT, classes: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    if classes.ndim != 1 or classes.is_floating_point():
        raise InputError(f"classes must be a one-dimensional integer tensor; got {tuple(classes.shape)} {classes.dtype}")
    gpt.check_classes(classes)
    if temperature < 0:
        raise InputError(f"temperature is {temperature}; it must not be negative")
    if top_k < 0:
        raise InputError(f"top_k is {top_k}; it must be 0 (off) or positive")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; it must be in (0, 1]")


@torch.no_grad()
def generate(
    gpt: GPT,
    classes: Tensor,
    *,
    cfg_scale: float = 1.0,
    cfg_schedule: str = "constant",
    cfg_schedule_kwargs: dict | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample one sequence of codes for each class.

    classes (B,) integers; the class num_classes means "no class". Returns codes (B, T) int64. With cfg_scale above 1
    each step runs the conditional and the unconditional sequence in one batch; the first code is fully guided
    whatever the schedule. top_k=1 is greedy. Raises InputError for arguments out of range.
    """
    classes = torch.as_tensor(classes)
    _check(gpt, classes, temperature, top_k, top_p)
    classes = classes.to(gpt.norm.weight.device)
    length = gpt.config.sequence_length
    scales = guidance_scales(length, cfg_scale, cfg_schedule, cfg_schedule_kwargs)
    guided = cfg_scale > 1
    was_training = gpt.training
    gpt.eval()
    try:
        tokens = torch.cat([classes, torch.full_like(classes, gpt.unconditional_class)]) if guided else classes
        caches, modulations = make_caches(gpt, len(tokens)), gpt.modulations(tokens)
        codes = []
        for position, scale in enumerate(scales):
            logits = gpt.decode_step(tokens, position, caches, modulations)
            logits = guide(logits, scale) if guided else logits
            chosen = choose_codes(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            codes.append(chosen)
            tokens = chosen.repeat(2) if guided else chosen
    finally:
        gpt.train(was_training)
    return torch.stack(codes, dim=1)
