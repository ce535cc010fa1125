"""Means and covariances against NumPy's; Frechet distances against closed forms and the evaluators' matrix root."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from feature_vectors import distance_of_few, features
from rank_runs import run_ranks

from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.distribution import FeatureStatistics, Gaussian, frechet_distance
from gigatok_ds.parallel.topology import start_process_group, stop_process_group


def statistics(vectors, *sizes):
    found = FeatureStatistics(vectors.shape[1])
    for batch in vectors.split(list(sizes) or 7):
        found.update(batch)
    return found


def numpy_gaussian(vectors):
    vectors = vectors.numpy()
    return Gaussian(torch.as_tensor(np.mean(vectors, axis=0)), torch.as_tensor(np.cov(vectors, rowvar=False)))


def evaluators_distance(ours, theirs):
    """What ADM's evaluator and pytorch-fid compute."""
    (m1, c1), (m2, c2) = ((side.mean.numpy(), side.covariance.numpy()) for side in (ours, theirs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of singular products
        root = scipy.linalg.sqrtm(c1 @ c2)
        if not np.isfinite(root).all():
            added = 1e-6 * np.eye(len(c1))
            root = scipy.linalg.sqrtm((c1 + added) @ (c2 + added))
    assert np.abs(np.imag(np.diagonal(root))).max() < 1e-3
    return (m1 - m2) @ (m1 - m2) + np.trace(c1) + np.trace(c2) - 2 * np.trace(root).real


def assert_same(found, vectors, tolerance=1e-12):
    expected = numpy_gaussian(vectors)
    assert found.count == len(vectors)
    scale = expected.covariance.abs().max().item()
    assert (found.gaussian().mean - expected.mean).abs().max() <= tolerance * (1 + expected.mean.abs().max())
    assert (found.gaussian().covariance - expected.covariance).abs().max() <= tolerance * scale


@pytest.mark.parametrize("sizes", [(50,), (1, 49), (1, 1, 0, 30, 18)])
def test_batches_give_what_numpy_gives_for_all(sizes):
    vectors = features(0, 50, 6)
    assert_same(statistics(vectors, *sizes), vectors)


def test_a_distant_mean_costs_no_digits():
    vectors = features(0, 1000, 4, offset=1e6)
    found = statistics(vectors)
    assert_same(found, vectors, 1e-9)
    squares = (vectors.T @ vectors - len(vectors) * torch.outer(found.mean, found.mean)) / (len(vectors) - 1)
    assert (squares - numpy_gaussian(vectors).covariance).abs().max() > 1e-5, "sums of squares would have lost them"


def test_statistics_merge_as_if_they_had_seen_the_same():
    vectors = features(1, 40, 5)
    ours, theirs, nothing = statistics(vectors[:13]), statistics(vectors[13:]), FeatureStatistics(5)
    nothing.merge(ours)
    nothing.merge(theirs)
    nothing.merge(FeatureStatistics(5))
    assert_same(nothing, vectors)


def shares_over_ranks(vectors, cuts):
    topology = start_process_group()
    found = statistics(vectors[cuts[topology.rank] : cuts[topology.rank + 1]]).over_ranks(topology.sum_over_ranks)
    stop_process_group(topology)
    return found.count, found.mean, found.scatter


@pytest.mark.parametrize("cuts", [(0, 11, 30), (0, 30, 30)])
def test_ranks_share_what_they_have_seen(cuts):
    vectors = features(2, 30, 8, offset=100.0)
    for count, mean, scatter in run_ranks(shares_over_ranks, 2, vectors, cuts):
        found = FeatureStatistics(8)
        found.count, found.mean, found.scatter = count, mean, scatter
        assert_same(found, vectors, 1e-11)


def test_too_few_and_non_finite_features_are_refused():
    with pytest.raises(InputError, match="at least 2 feature vectors, but there are 1"):
        statistics(features(0, 1, 3)).gaussian()
    with pytest.raises(InputError, match="some of 5 feature vectors are not finite"):
        statistics(features(0, 5, 3).index_fill(0, torch.tensor([2]), float("nan"))).gaussian()


# (vectors of each side, dimensions, true dimensions): all singular but the first.
CASES = [(200, 24, None), (12, 24, None), (200, 24, 5), (9, 64, None), (2, 16, None)]


@pytest.mark.parametrize("count, width, rank", CASES)
def test_distances_are_the_evaluators(count, width, rank):
    ours, theirs = (statistics(features(seed, count, width, rank=rank)).gaussian() for seed in (3, 4))
    assert frechet_distance(ours, theirs) == pytest.approx(evaluators_distance(ours, theirs), rel=1e-4)
    assert frechet_distance(theirs, ours) == pytest.approx(frechet_distance(ours, theirs), rel=1e-9)
    expected = distance_of_few(*(features(seed, count, width, rank=rank) for seed in (3, 4)))
    assert frechet_distance(ours, theirs) == pytest.approx(expected, rel=1e-10)


def test_few_vectors_against_many_leave_no_rounding_behind():
    """Roots of eigenvalues that are rounding (1e-16) would be 1e-8 in each of 61 dimensions that only one set fills."""
    few, many = features(3, 4, 64), features(4, 300, 64)
    distance = frechet_distance(statistics(few).gaussian(), statistics(many).gaussian())
    assert distance == pytest.approx(distance_of_few(few, many), rel=1e-10)


@pytest.mark.parametrize("count, width, rank", CASES)
def test_equal_sets_are_no_distance_apart(count, width, rank):
    vectors = features(5, count, width, rank=rank)
    ours, theirs = statistics(vectors).gaussian(), statistics(vectors.flip(0)).gaussian()
    assert 0 <= frechet_distance(ours, theirs) <= 1e-6 * ours.covariance.trace().item()


def test_diagonal_gaussians_have_a_closed_form():
    """|m1 - m2|^2 + sum (s1 - s2)^2, zero spreads included, in any orthonormal basis."""
    rng = np.random.default_rng(6)
    means, spreads = torch.as_tensor(rng.normal(size=(2, 32))), torch.as_tensor(rng.exponential(size=(2, 32)))
    spreads[0, :5] = spreads[1, 3:9] = 0
    expected = float((means[0] - means[1]).square().sum() + (spreads[0] - spreads[1]).square().sum())
    basis = torch.linalg.qr(torch.as_tensor(rng.normal(size=(32, 32))))[0]
    for turn in (torch.eye(32, dtype=torch.float64), basis):
        sides = [Gaussian(turn @ mean, turn @ spread.square().diag() @ turn.T)
                 for mean, spread in zip(means, spreads, strict=True)]
        assert frechet_distance(*sides) == pytest.approx(expected, rel=1e-6)


def test_vectors_fewer_than_dimensions_have_an_exact_answer():
    """Two sets of three in subspaces that share a direction: spreads there differ, what is apart adds up."""
    slope = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    bend = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64) / 3**0.5  # of variance 1, too, and uncorrelated
    ours, theirs = torch.zeros(3, 40, dtype=torch.float64), torch.zeros(3, 40, dtype=torch.float64)
    ours[:, 0], theirs[:, 0] = 2 * slope, 5 * slope
    ours[:, 1], theirs[:, 2] = 3 * bend, 7 * bend + 1
    distance = frechet_distance(statistics(ours).gaussian(), statistics(theirs).gaussian())
    assert distance == pytest.approx((2 - 5) ** 2 + 3**2 + 7**2 + 1**2, rel=1e-6)
    same = torch.ones(4, 40)
    assert frechet_distance(statistics(same).gaussian(), statistics(3 * same).gaussian()) == pytest.approx(40 * 4)
