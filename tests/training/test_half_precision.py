"""A run in fp16 whose projection onto the teacher leaves float16's range."""

import math

import pytest
from layout_runs import Layout, LayoutRuns, use_stand_ins
from rank_runs import run_ranks
from torch import nn
from training_runs import partitioning

from gigatok_ds.monitoring.metrics import read_metrics


def train_with_a_steep_projection(recipe, out, stage, naive):
    """On CPUs that DeepSpeed takes for some with fp16."""
    from deepspeed.accelerator import get_accelerator

    from gigatok_ds.engine import engine
    from gigatok_ds.models.latent_decoder import WideRangeLinear
    from gigatok_ds.training.run import run_training

    initialise_ = engine.initialise_

    def steeply(network, seed, *, full, **options):
        initialise_(network, seed, full=full, **options)
        for layer in network.decoder.distill_mlp[::2]:
            with full(layer.weight):
                layer.weight.data *= 3000

    engine.initialise_ = steeply
    get_accelerator().is_fp16_supported = lambda: True
    if naive:
        WideRangeLinear.forward = nn.Linear.forward
    use_stand_ins()
    run_training(recipe, out, partitioning(stage) | {"fp16": {"enabled": True, "initial_scale_power": 2}})


@pytest.mark.parametrize(("naive", "layout"), [
    (False, Layout(stage=1)), (True, Layout(stage=1)),
    pytest.param(False, Layout(tensor=2, data=2, stage=3, sequence=True), marks=pytest.mark.slow)], ids=str)
def test_the_semantic_term_stays_finite(tmp_path, naive, layout):
    runs, out = LayoutRuns(tmp_path), tmp_path / "run"
    recipe = runs.recipe("tokenizer", layout, "training.precision=fp16", "training.steps=3",
                                     "training.validate_every=3", "checkpoint.every=3", "training.log_every=1")
    run_ranks(train_with_a_steep_projection, layout.tensor * layout.data, recipe, out, layout.stage, naive)
    steps = [line for line in read_metrics(out) if "skipped_steps" in line or "loss" in line]
    if naive:
        assert [line["skipped_steps"] for line in steps] == [1, 2, 3]
    else:
        assert [math.isfinite(line["loss/semantic"]) for line in steps] == [True] * 3
