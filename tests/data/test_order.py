"""The order of more samples than fit: computed place by place, a permutation like those that are drawn as a whole."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gigatok_ds.data import order as order_module
from gigatok_ds.data.mixture import MixedBatches, Mixture
from gigatok_ds.data.order import HELD, AsStored, ComputedOrder, Locality, epoch_order, permuted
from gigatok_ds.data.reader import GlobalBatches

MILLION = 10**6


def keys(seed):
    return np.random.default_rng(seed).integers(2**64, size=8, dtype=np.uint64)


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 5000), seed=st.integers(0, 2**40))
def test_it_is_a_permutation_whatever_the_count(count, seed):
    found = permuted(np.arange(count), count, keys(seed))
    assert sorted(found.tolist()) == list(range(count))
    some = np.random.default_rng(seed).integers(0, count, 20)  # any place by itself, in any company
    assert (permuted(some, count, keys(seed)) == found[some]).all()


def test_every_sample_comes_at_every_place_equally_often():
    """Chi-square of place by sample, 6,000 orders of ten: 99.99% of random orders stay below the bound."""
    count, orders = 10, 6000
    table = np.zeros((count, count))
    for seed in range(orders):
        table[np.arange(count), permuted(np.arange(count), count, keys(seed))] += 1
    expected = orders / count
    assert ((table - expected) ** 2 / expected).sum() < 143.0  # (count - 1) ** 2 = 81 degrees of freedom


def test_pairs_that_follow_each_other_are_as_those_of_a_random_order():
    """Of all 30 ordered pairs of six samples at places 0 and 1: 29 degrees of freedom."""
    orders, count = 6000, 6
    found = [tuple(permuted(np.arange(2), count, keys(seed)).tolist()) for seed in range(orders)]
    expected = orders / (count * (count - 1))
    pairs = itertools.permutations(range(count), 2)
    assert sum((found.count(pair) - expected) ** 2 / expected for pair in pairs) < 65.0


def test_a_large_order_looks_random():
    """Neighbours in the order are unrelated in the data, and half of a batch comes from either half: within five
    standard deviations.
    """
    count, places = 100 * MILLION, np.arange(MILLION)
    order = epoch_order(count, 0, 0)
    found = order[places] / count
    assert isinstance(order, ComputedOrder)
    assert abs(found.mean() - 0.5) < 5 * np.sqrt(1 / 12 / MILLION)
    for lag in (1, 2, 3, 32, 1024):
        assert abs(np.corrcoef(found[:-lag], found[lag:])[0, 1]) < 5 / np.sqrt(MILLION), lag
    shares = np.histogram(found, 64, (0, 1))[0]
    assert ((shares - MILLION / 64) ** 2 / (MILLION / 64)).sum() < 63 + 5 * np.sqrt(2 * 63)
    assert (epoch_order(count, 0, 1)[places] != order[places]).mean() > 0.999


def test_memory_is_that_of_the_tars():
    counts = np.full(10_000, 10_000)
    order = epoch_order(100 * MILLION, 0, 0, Locality(counts, 64))
    assert sum(value.nbytes for value in vars(order).values()) < 100 * len(counts)
    sample = order[np.arange(0, 100 * MILLION, 1001)]
    assert len(np.unique(sample)) == len(sample) and sample.min() >= 0 and sample.max() < 100 * MILLION
    near = order[np.arange(64 * 10_000)] // 10_000  # a group's samples come before those of the next
    assert len(np.unique(near)) == 64


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_of_a_hundred_million_is_found_from_its_number(shuffle):
    tracemalloc.start()
    try:
        batches = GlobalBatches(100 * MILLION, 1024, 0, shuffle)
        epochs, samples = batches.locate(12 * 97_656 - 1)  # the last of the twelfth epoch
        assert tracemalloc.get_traced_memory()[1] < MILLION
    finally:
        tracemalloc.stop()
    assert set(epochs.tolist()) == {11} and len(set(samples.tolist())) == 1024
    assert shuffle or samples.tolist() == list(range(97_655 * 1024, 97_656 * 1024))


def test_a_mixture_computes_the_order_of_its_large_source_only():
    counts, locality = [100 * MILLION, 1000], Locality(np.array([60 * MILLION, 40 * MILLION, 400, 600]), 1)
    batches = MixedBatches(Mixture(counts=counts, weights=[1, 1]), 512, 0, locality=locality)
    samples = batches.batch(3)
    small = samples[samples >= counts[0]]
    assert 200 < len(small) < 312 and len(set(small.tolist())) == len(small) and samples.max() < sum(counts)
    first = samples[samples < counts[0]] >= 60 * MILLION  # one tar after the other
    assert first.all() or not first.any()


def test_what_fits_is_drawn_as_a_whole(monkeypatch):
    """The order of runs so far: NumPy's permutation."""
    drawn = epoch_order(1000, 5, 2)
    assert isinstance(drawn, np.ndarray) and HELD > 1_281_167  # ImageNet
    monkeypatch.setattr(order_module, "HELD", 999)
    assert isinstance(epoch_order(1000, 5, 2), ComputedOrder)
    assert AsStored()[np.array([5, 3])].tolist() == [5, 3]
