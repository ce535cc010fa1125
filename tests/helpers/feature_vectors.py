"""Vectors like a network's features, and how far two sets of them are apart."""

import numpy as np
import torch


def features(seed, count, width, *, rank=None, offset=0.0):
    """Correlated vectors with spread of very different size, like those of a network."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(rank or width, width)) * np.exp(rng.normal(size=width))
    return torch.as_tensor(rng.normal(size=(count, rank or width)) @ mixing + rng.normal(size=width) + offset)


def distance_of_few(ours, theirs):
    """Of two sets of N vectors, without matrices of their dimension: with centred rows X / (N - 1)^(1/2) as R^T in
    C = R R^T, the roots' overlap is the sum of the singular values of X1 X2^T / (N - 1)."""
    means = [side.mean(dim=0) for side in (ours, theirs)]
    ours, theirs = ((side - mean) / (len(side) - 1) ** 0.5 for side, mean in zip((ours, theirs), means, strict=True))
    apart = (means[0] - means[1]).square().sum() + ours.square().sum() + theirs.square().sum()
    return (apart - 2 * torch.linalg.matrix_norm(ours @ theirs.T, "nuc")).item()
