"""Choosing one code from logits: temperature, top-k, top-p, then a draw."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (B, vocab) with everything below the k-th largest removed; ties with it are kept."""
    threshold = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < threshold, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus filtering (Holtzman et al. 2019, arXiv:1904.09751): the smallest set of codes whose probability
    exceeds p, including the code that crosses it."""
    ordered, order = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    removed = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before > p)
    return logits.masked_fill(removed, float("-inf"))


def choose_codes(logits: Tensor, *, temperature: float, top_k: int, top_p: float,
                 generator: torch.Generator | None) -> Tensor:
    """Logits (B, vocab) to codes (B,). top_k 0 and top_p 1 keep everything; top_k 1 is greedy."""
    if top_k == 1:
        return logits.argmax(-1)
    logits = logits / max(temperature, 1e-5)
    if top_k > 0:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
