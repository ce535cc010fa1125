"""The distribution metrics of OpenAI's ADM evaluator (Dhariwal & Nichol 2021, arXiv:2105.05233), from features.

Statistics are float64. Precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991) take squared distances as the
evaluator does, in float16: with float32 they come out different in the third digit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.distribution import FeatureStatistics, Gaussian

NEIGHBOURS = 3
SPLIT = 5000  # consecutive samples of one inception score
BLOCK = 10_000  # points in a block of distances, which is in float16 if all of it is finite there


def gaussian_of(features: Tensor) -> Gaussian:
    """Mean and covariance (over N - 1) of feature vectors (N, D), in float64. Raises as `FeatureStatistics.gaussian`.
    """
    statistics = FeatureStatistics(features.shape[1], features.device)
    for batch in features.split(1024):
        statistics.update(batch)
    return statistics.gaussian()


def inception_score(logits: Tensor, split: int = SPLIT) -> float:
    """exp of the mean KL divergence of p(class | image) from its mean, averaged over splits of consecutive images.

    logits (N, classes). The last split may be shorter. (Salimans et al. 2016, arXiv:1606.03498)
    """
    if not len(logits):
        raise InputError("the inception score needs at least one image")
    scores = []
    for part in logits.double().split(split):
        log_probabilities = part.log_softmax(dim=1)
        probabilities = log_probabilities.exp()
        log_mean = probabilities.mean(dim=0).log()
        divergence = torch.special.xlogy(probabilities, 1) + probabilities * (log_probabilities - log_mean)
        scores.append(divergence.nan_to_num(0.0).sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())


class PrecisionRecall(NamedTuple):
    """precision: fraction of samples inside the reference's manifold; recall: of reference images inside the samples'.
    """

    precision: float
    recall: float


def precision_recall(reference: Tensor, samples: Tensor, *, neighbours: int = NEIGHBOURS,
                     half: bool = True) -> PrecisionRecall:
    """Of features (M, D) and (N, D). A manifold is the union of balls around its points, each of which reaches to the
    point's `neighbours`-th nearest other one, boundary included; distances in float32 unless `half`.

    Raises InputError when either has no more than `neighbours` vectors.
    """
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= neighbours:
            raise InputError(f"precision and recall need more than {neighbours} images, but the {name} has "
                             f"{len(features)}")
    inside = [_inside(points, manifold, _radii(manifold, neighbours, half), half)
              for points, manifold in ((samples, reference), (reference, samples))]
    return PrecisionRecall(*(float(found.double().mean()) for found in inside))


def _radii(points: Tensor, neighbours: int, half: bool) -> Tensor:
    """Squared radius (N,) of each point's ball: entry `neighbours`, from 0, of its sorted distances, its own included.
    """
    radii = []
    for rows in points.split(BLOCK):
        nearest = [squared_distances(rows, columns, half).topk(min(neighbours + 1, len(columns)), largest=False).values
                   for columns in points.split(BLOCK)]
        radii.append(torch.cat(nearest, dim=1).sort(dim=1).values[:, neighbours])
    return torch.cat(radii)


def _inside(points: Tensor, manifold: Tensor, radii: Tensor, half: bool) -> Tensor:
    """Which points lie in a ball of the manifold."""
    found = []
    for rows in points.split(BLOCK):
        inside = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for centers, limits in zip(manifold.split(BLOCK), radii.split(BLOCK), strict=True):
            inside |= (squared_distances(rows, centers, half) <= limits).any(dim=1)
        found.append(inside)
    return torch.cat(found)


def squared_distances(rows: Tensor, columns: Tensor, half: bool = True) -> Tensor:
    """|u|^2 - 2 u.v + |v|^2, not below 0, float32 (rows, columns); every term rounded to float16 if all are finite."""
    if half:
        distances = _expanded(rows.half().float(), columns.half().float(), lambda values: values.half().float())
        if distances.isfinite().all():
            return distances
    return _expanded(rows.float(), columns.float(), lambda values: values)


def _expanded(rows: Tensor, columns: Tensor, rounded) -> Tensor:
    # On GPUs, TensorFloat-32 products of float16 values are exact, but those of float32 values are not.
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        products = rounded(rows @ columns.T)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    row_norms, column_norms = (rounded(rounded(part.square()).sum(dim=1)) for part in (rows, columns))
    return rounded(rounded(row_norms[:, None] - rounded(2 * products)) + column_norms).clamp_(min=0)
