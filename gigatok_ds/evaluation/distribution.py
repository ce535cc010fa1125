"""Mean and covariance of features, gathered as they come, and the Frechet distance of two such Gaussians.

The distance is that of Heusel et al. 2017 as the evaluators of ADM and pytorch-fid define it,

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2),

with covariances over N - 1. Those evaluators take a Schur-based square root of the product C1 C2, and add 1e-6 to both
diagonals when it comes out infinite, as it may when fewer vectors than dimensions leave a covariance singular. Here the
trace is the sum of the singular values of C1^(1/2) C2^(1/2), with triangular factors in place of the roots. That is the
same number, finite and accurate for singular covariances, so nothing is ever added to a diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from gigatok_ds.errors import InputError


@dataclass(frozen=True)
class Gaussian:
    """mean (D,) and covariance (D, D), float64 and on one device."""

    mean: Tensor
    covariance: Tensor


class FeatureStatistics:
    """Count, mean and scatter of feature vectors in float64: memory of D x D, however many vectors there are.

    Deviations are taken from the running mean (Chan et al. 1983), so that a mean far from zero costs no digits.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Take in feature vectors (B, D); B may be zero."""
        if not len(features):
            return
        features = features.double()
        mean = features.mean(dim=0)
        deviations = features - mean
        self.scatter.addmm_(deviations.T, deviations)
        self._move(len(features), mean)

    def merge(self, other: FeatureStatistics) -> None:
        """Take in all that `other` has seen."""
        if other.count:
            self.scatter += other.scatter
            self._move(other.count, other.mean)

    def _move(self, count: int, mean: Tensor) -> None:
        """To the joint mean with `count` more vectors around `mean`."""
        total, apart = self.count + count, mean - self.mean
        self.scatter.addr_(apart, apart, alpha=self.count * count / total)
        self.mean += apart * (count / total)
        self.count = total

    def over_ranks(self, add: Callable[[Tensor], Tensor]) -> FeatureStatistics:
        """The moments of what all ranks have seen. `add` sums a tensor over ranks, perhaps in place; collective."""
        full = FeatureStatistics(len(self.mean), self.mean.device)
        full.count = int(add(torch.tensor(self.count, device=self.mean.device)))
        if full.count:
            full.mean = add(self.mean * self.count) / full.count
            apart = self.mean - full.mean
            full.scatter = add(self.scatter.addr(apart, apart, alpha=self.count))
        return full

    def gaussian(self) -> Gaussian:
        """Raises InputError for fewer than two vectors, and when one was not finite."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 feature vectors, but there are {self.count}")
        if not self.scatter.isfinite().all():
            raise InputError(f"some of {self.count} feature vectors are not finite")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


def frechet_distance(ours: Gaussian, theirs: Gaussian) -> float:
    """The distance above; 0 for equal Gaussians but for rounding, at most 1e-9 of their traces, and never below 0."""
    overlap = torch.linalg.svdvals(_root(ours.covariance).T @ _root(theirs.covariance)).sum()
    apart = (ours.mean - theirs.mean).square().sum()
    distance = apart + ours.covariance.trace() + theirs.covariance.trace() - 2 * overlap
    return max(float(distance), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """R (D, rank) with R R^T = covariance: its Cholesky factor with pivots (LAPACK's dpstrf), up to where only rounding
    is left.

    (The singular values of R1^T R2 are those of C1^(1/2) C2^(1/2), which only has orthonormal bases around it.)
    """
    factor, pivots, rank, _ = lapack.dpstrf(covariance.cpu().numpy(), lower=True)
    root = np.empty((len(factor), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    return torch.from_numpy(root).to(covariance.device)
