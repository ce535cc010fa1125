"""Learning-rate schedules against the original's, to 1e-12."""

import json

import pytest
from places import GOLDEN

from gigatok_ds.config.recipe import ScheduleConfig
from gigatok_ds.training.schedules import lr_of_iteration, scheduled_lr

TABLE = json.loads((GOLDEN / "schedules.json").read_text())


@pytest.mark.parametrize("name", [name for name in TABLE if name != "steps"])
def test_schedules_match_the_original(name):
    kind, shape = ("wsd", name.removeprefix("wsd_")) if name.startswith("wsd_") else (name, "sqrt")
    config = ScheduleConfig(kind=kind, warmup_steps=100, end_lr=1e-5, decay_fraction=0.2, decay_shape=shape)
    ours = [scheduled_lr(config, 1e-4, 1000, step) for step in TABLE["steps"]]
    assert ours == pytest.approx(TABLE[name], rel=0, abs=1e-12)


def test_long_runs_at_the_published_points():
    cosine = ScheduleConfig(kind="cosine_v2", warmup_steps=5000, end_lr=1e-5)
    assert scheduled_lr(cosine, 1e-4, 1_500_000, 750_000) == pytest.approx(5.523640638648878e-5, abs=1e-16)
    assert scheduled_lr(cosine, 1e-4, 1_500_000, 1_500_000) == 1e-5
    wsd = ScheduleConfig(kind="wsd", warmup_steps=5000)
    assert scheduled_lr(wsd, 1e-4, 1_500_000, 1_200_000) == 1e-4
    assert scheduled_lr(wsd, 1e-4, 1_500_000, 1_350_000) == pytest.approx(2.9289321881345244e-5, abs=1e-16)


def test_the_first_iteration_is_not_warmed_up_and_the_rest_lag_by_one():
    config = ScheduleConfig(kind="const", warmup_steps=10)
    rates = [lr_of_iteration(config, 1.0, 100, iteration) for iteration in range(13)]
    assert rates[0] == 1.0 and rates[1] == pytest.approx(0.01) and rates[6] == pytest.approx(0.5 + 0.5 / 100)
    assert rates[11:] == [1.0, 1.0]
