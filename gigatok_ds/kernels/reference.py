"""Nearest code and assignment entropy in plain torch, always in float32 or better."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows searched at once: bounds the (rows, K) distance matrix to 64 MB of float32 at K = 16,384.
_ROWS = 1024


def squared_distances(latents: Tensor, codebook: Tensor) -> Tensor:
    """(N, D) and (K, D) to (N, K) squared Euclidean distances, as |z|^2 + |e|^2 - 2 z.e."""
    return latents.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * latents @ codebook.t()


@torch.no_grad()
def nearest_code(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index (N,) int64 of the nearest of K codes for each of N latents; the lowest index wins a tie."""
    return torch.cat([squared_distances(rows, codebook).argmin(1) for rows in latents.split(_ROWS)])


def assignment_entropy(latents: Tensor, codebook: Tensor, temperature: float = 0.01, *,
                       average: Callable[[Tensor], Tensor] = lambda q: q) -> Tensor:
    """Mean entropy of each latent's soft assignment minus the entropy of the mean assignment (a scalar).

    With p = softmax(-d / temperature) over the K codes and q = mean of p over the N latents, this is
    mean_n H(p_n) + sum_k q_k log(q_k + 1e-5): small when assignments are confident and the codebook is used evenly
    (LFQ's entropy penalty, Yu et al. 2023, arXiv:2310.05737, applied to a learned codebook). `average` takes q (K,)
    to its mean over ranks that hold further latents.
    """
    logits = -squared_distances(latents, codebook) / temperature
    log_p = F.log_softmax(logits, dim=1)
    p = log_p.exp()
    sample_entropy = -(p * log_p).sum(1).mean()
    q = average(p.mean(0))
    return sample_entropy + (q * (q + 1e-5).log()).sum()
