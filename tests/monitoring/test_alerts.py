"""Warnings about terms that do not pull and codebooks that collapse: when they come, and how often."""

import math

import pytest

from gigatok_ds.monitoring.alerts import Collapse, DeadTerms


def lines(alert, steps, values):
    """{step: warnings} where there were any; values(step) is the line logged then."""
    told = {step: alert.update(step, values(step)) for step in steps}
    return {step: warnings for step, warnings in told.items() if warnings}


def norms(**values):
    return {f"term_grad/{name}": value for name, value in values.items()} | {"loss": 1.0}


def test_a_dead_term_is_named_once_after_its_steps():
    told = lines(DeadTerms(100), range(20, 401, 20), lambda step: norms(a=1e-9, b=2.0, c=0.5))
    (warning,) = told.pop(100)
    assert not told and "the term a is dead: for 100 steps" in warning
    assert "now 1e-09, of b 2" in warning


@pytest.mark.parametrize("norm, dead", [(1.9e-6, True), (2.1e-6, False), (0.0, True), (math.nan, False)])
def test_dead_is_below_a_millionth_of_the_largest_other(norm, dead):
    assert bool(lines(DeadTerms(30), range(10, 101, 10), lambda step: norms(a=norm, b=2.0, c=1e-3))) == dead


def test_steps_count_in_a_row_only():
    alert = DeadTerms(50)
    assert not lines(alert, range(10, 301, 10), lambda step: norms(a=1.0 if step % 50 == 0 else 0.0, b=2.0))
    assert list(lines(alert, range(310, 401, 10), lambda step: norms(a=0.0, b=2.0))) == [350]


def test_a_term_that_was_inactive_counts_anew_and_other_lines_do_not_matter():
    def values(step):
        return {"validation/psnr": 20.0} if step % 20 else norms(b=2.0) if step == 60 else norms(a=0.0, b=2.0)

    assert list(lines(DeadTerms(60), range(10, 201, 10), values)) == [120]


def test_a_single_term_or_overflowing_others_say_nothing():
    assert not lines(DeadTerms(10), range(10, 101, 10), lambda step: norms(a=0.0))
    assert not lines(DeadTerms(10), range(10, 101, 10), lambda step: norms(a=1.0, b=math.inf))


def used(usage, perplexity):
    return {"codebook_usage": usage, "codebook_perplexity": perplexity}


def test_a_collapse_is_told_again_only_after_recovery():
    usage = {30: 0.5, 40: 0.04, 50: 0.01, 60: 0.06, 70: 0.02}
    told = lines(Collapse(0.05, 1000, 10_000), usage, lambda step: used(usage[step], 900))
    assert list(told) == [40, 70]
    assert "4.00% of its 1000 codes are in use, with a perplexity of 900 (warned below 5%)" in told[40][0]


@pytest.mark.parametrize("perplexity, collapsed", [(49.0, True), (51.0, False)])
def test_many_codes_that_hardly_occur_are_a_collapse_too(perplexity, collapsed):
    assert bool(lines(Collapse(0.05, 1000, 10_000), [100], lambda step: used(1.0, perplexity))) == collapsed


@pytest.mark.parametrize("size, first", [(16384, 6554), (64, 205)])  # 65,536 codes, and 32 x 64
def test_nothing_is_told_before_enough_codes_were_seen(size, first):
    told = lines(Collapse(0.05, size, 10), range(1, 7000), lambda step: used(1 / size, 1.0))
    assert list(told) == [first]


def test_a_threshold_of_zero_switches_it_off():
    assert not lines(Collapse(0.0, 64, 1000), range(1, 100), lambda step: used(1 / 64, 1.0))
