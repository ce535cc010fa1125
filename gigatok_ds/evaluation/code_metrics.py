"""How codes are distributed over the codebook.

Below, n_k is how often code k occurs among the N given codes of a codebook of K, and p_k = n_k / N. Codes may
come in any shape and integer type. Every function raises InputError when there are no codes, or one is not in
0 .. K - 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gigatok_ds.errors import InputError


def code_counts(codes: Tensor, codebook_size: int) -> Tensor:
    """n_k as float64 (codebook_size,)."""
    codes = torch.as_tensor(codes).flatten().long()
    if not len(codes):
        raise InputError("there are no codes to measure")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        raise InputError(f"codes go from {low} to {high}; "
                         f"a codebook of {codebook_size} allows 0 to {codebook_size - 1}")
    return torch.bincount(codes, minlength=codebook_size).double()


def codebook_usage(codes: Tensor, codebook_size: int) -> float:
    """Fraction of the codebook that occurs at all: |{k : n_k > 0}| / K."""
    return usage_of_counts(code_counts(codes, codebook_size))


def usage_of_counts(counts: Tensor) -> float:
    """The same from n_k, (K,)."""
    return int(counts.count_nonzero()) / len(counts)


def unigram_entropy(codes: Tensor, codebook_size: int) -> float:
    """Entropy of the empirical distribution, -sum_k p_k ln p_k, in nats per code.

    What the best model would pay that knows how frequent codes are, but neither position, class nor context.
    """
    return entropy_of_counts(code_counts(codes, codebook_size))


def entropy_of_counts(counts: Tensor) -> float:
    """The same from n_k, (K,)."""
    return float(torch.special.entr(counts.double() / counts.sum()).sum())


def perplexity(codes: Tensor, codebook_size: int) -> float:
    """exp of the unigram entropy: from 1 (a single code) to K (all equally frequent)."""
    return math.exp(unigram_entropy(codes, codebook_size))
