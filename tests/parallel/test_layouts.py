"""Every layout trains like a single process: losses, gradient norms and gathered weights after ten steps in fp32.

A few layouts always; all of them with `pytest -m slow tests/parallel/test_layouts.py`.
"""

import shutil

import pytest
from layout_runs import PARTS, Layout, LayoutRuns, largest_differences, train_on_a_rank
from rank_runs import run_ranks
from training_runs import code_shards, partitioning

from gigatok_ds.monitoring.metrics import read_metrics

TOLERANCE = 1e-5

ALWAYS = [
    ("tokenizer", Layout(tensor=2, data=2, stage=3, sequence=True, recompute=True)),
    ("gpt", Layout(tensor=2, data=1, stage=1, sequence=True)),
    ("gpt", Layout(tensor=2, data=2, stage=3, sequence=True, recompute=True)),
    ("gpt", Layout(tensor=2, data=2, stage=0, accumulate=True)),
    ("gpt", Layout(tensor=4, data=1, stage=2)),
]
# GPTs on a grid of 16 codes, with everything that their plain form lacks.
VARIANTS = [
    ("adaln", Layout(tensor=2, data=1, stage=3, sequence=True, recompute=True)),
    ("simple_adaln", Layout(tensor=2, data=1, stage=1)),
]
SHAPES = [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (1, 4)]
ALL = [
    (kind, Layout(tensor=tensor, data=data, stage=stage, recompute=recompute, sequence=sequence))
    for kind in PARTS
    for tensor, data in SHAPES
    for stage in range(4)
    for recompute in (False, True)
    for sequence in ((False, True) if tensor > 1 else (False,))
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return LayoutRuns(tmp_path_factory.mktemp("layouts"))


def assert_like_a_single_process(runs, kind, layout, *more):
    losses, norms, weights = largest_differences(runs.result(kind, layout, *more), runs.result(kind, Layout(), *more))
    assert losses < TOLERANCE and norms < TOLERANCE and weights < TOLERANCE, (losses, norms, weights)


@pytest.mark.parametrize("kind, layout", ALWAYS, ids=str)
def test_some_layouts_train_like_a_single_process(runs, kind, layout):
    assert_like_a_single_process(runs, kind, layout)


@pytest.mark.parametrize("conditioning, layout", VARIANTS, ids=str)
def test_variants_of_the_gpt_do_so_too(tmp_path, conditioning, layout):
    runs = LayoutRuns(tmp_path)
    for name, count in (("train", 40), ("validation", 11)):
        code_shards(tmp_path / f"grid_{name}", count, seed=count, tokens=16)
    more = ["model.sequence_length=16", "model.positions=rope_2d", f"model.conditioning={conditioning}",
            "model.drop_path=0.3", f"data.train={tmp_path / 'grid_train'}",
            f"data.validation={tmp_path / 'grid_validation'}"]
    assert_like_a_single_process(runs, "gpt", layout, *more)
    moved = {"adaln": "layers.1.adaLN_modulation.1.weight", "simple_adaln": "adaLN.1.weight"}[conditioning]
    assert runs.result("gpt", layout, *more)[1][moved].norm() > 1e-4, "it starts at zero"


@pytest.mark.slow
@pytest.mark.parametrize("layout", [
    Layout(tensor=2, stage=1, sequence=True, recompute=True), Layout(tensor=4), Layout(data=4, stage=2),
    Layout(tensor=2, data=2, stage=3, sequence=True, recompute=True)], ids=str)
def test_dropout_of_attention_feature_maps_and_lpips_does_not_depend_on_the_layout(runs, layout):
    more = "model.dropout=0.1", "loss.perceptual={weight: 0.5, dropout: true}"
    assert_like_a_single_process(runs, "tokenizer", layout, *more)
    dropped, plain = (runs.result("tokenizer", Layout(), *settings)[0] for settings in (more, ()))
    for name in ("loss/reconstruction", "loss/perceptual"):
        assert dropped[0][name] != plain[0][name], name


@pytest.mark.slow
def test_dropout_goes_on_alike_when_a_run_is_resumed_at_another_layout(runs, tmp_path):
    more = "model.dropout=0.1", "loss.perceptual={weight: 0.5, dropout: true}", "checkpoint.every=5"
    for layout in (Layout(tensor=2, data=2, stage=3, sequence=True), Layout(data=2, stage=1)):
        run_ranks(train_on_a_rank, layout.tensor * layout.data, runs.recipe("tokenizer", layout, *more),
                  tmp_path / "run", partitioning(layout.stage), timeout=900)
        losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
        shutil.rmtree(tmp_path / "run/checkpoints/step-0000010")
    alone = runs.result("tokenizer", Layout(), *more[:2])[0]
    assert losses == pytest.approx([line["loss"] for line in alone if "loss" in line], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("kind, layout", [case for case in ALL if case not in ALWAYS], ids=str)
def test_every_layout_trains_like_a_single_process(runs, kind, layout):
    assert_like_a_single_process(runs, kind, layout)


def test_the_reference_trains(runs):
    """Otherwise all of this would compare things that stand still."""
    for kind in PARTS:
        metrics, _ = runs.result(kind, Layout())
        steps = [line for line in metrics if "loss" in line]
        assert len({line["loss"] for line in steps}) == 10
        assert all(line[f"grad_norm/{PARTS[kind]}"] > 0.5 for line in steps), "clipping should be active"
    active = [line["step"] for line in runs.result("tokenizer", Layout())[0] if "loss/adversarial" in line]
    assert active == [4, 5, 6, 7, 8, 9, 10]
