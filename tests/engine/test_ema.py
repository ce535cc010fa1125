"""The moving average of weights: spread over ranks and stages, it is the one of a single process, and resumes bitwise.
"""

import os
import shutil

import pytest
import torch
from rank_runs import run_ranks
from safetensors import safe_open
from saved_runs import read_ema, read_weights
from training_runs import partitioning, prepare

from gigatok_ds.checkpoint.conversion import convert
from gigatok_ds.checkpoint.model_sources import open_model
from gigatok_ds.checkpoint.original import build_on_meta
from gigatok_ds.checkpoint.standalone import lazy_weights
from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe
from gigatok_ds.errors import InputError
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.models.tokenizer import Tokenizer

DECAY, STEPS = 0.8, 4
PARTS = {"tokenizer": "generator", "gpt": "gpt"}


def train(recipe, out, settings):
    from gigatok_ds.training.run import run_training

    run_training(recipe, out, settings)


class Runs:
    """Runs of a few steps with a checkpoint after each, on demand, once."""

    def __init__(self, folder):
        self.folder, self.data = folder, prepare(folder)

    def recipe(self, kind, *more):
        return load_recipe(self.folder / f"{kind}.yaml", [
            f"training.steps={STEPS}", "checkpoint.every=1", f"training.ema_decay={DECAY}", "optimizer.eps=1e-3",
            *self.data[kind], *more])

    def run(self, kind, stage, ranks=1, *more):
        out = self.folder / "-".join([kind, str(stage), str(ranks), *more])
        if not out.exists():
            run_ranks(train, ranks, self.recipe(kind, *more), out, partitioning(stage))
        return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("ema"))


def engine_folder(out, kind, step=STEPS):
    return out / "checkpoints" / f"step-{step:07d}" / PARTS[kind]


def average(out, kind, step=STEPS):
    return read_ema(engine_folder(out, kind, step))


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours)


def test_it_is_the_average_of_the_weights_after_each_step(runs):
    recipe, out = runs.recipe("tokenizer"), runs.run("tokenizer", 1)
    expected = {name: value.double() for name, value in
                initialise_(Tokenizer(recipe.model), recipe.training.seed).named_parameters()}
    for step in range(1, STEPS + 1):
        weights = read_weights(engine_folder(out, "tokenizer", step))
        expected = {name: DECAY * value + (1 - DECAY) * weights[name].double() for name, value in expected.items()}
        assert largest_difference(average(out, "tokenizer", step), expected) <= 1e-6
    moved = largest_difference(average(out, "tokenizer"), {name: weights[name] for name in expected})
    assert moved > 1e-4, "the average lags behind the weights"


@pytest.mark.parametrize("kind, stage, ranks, more", [
    ("tokenizer", 0, 1, []),
    ("tokenizer", 3, 1, []),
    ("gpt", 0, 2, []),
    ("gpt", 2, 2, []),
    ("gpt", 3, 2, []),
    ("gpt", 3, 1, ["training.micro_batch_size=4"]),
    ("gpt", 1, 2, ["parallel.tensor=2"]),
])
def test_every_layout_has_the_average_of_a_single_process(runs, kind, stage, ranks, more):
    """To 1e-6: float32 rounding of four steps, of weights of order 0.1."""
    assert largest_difference(average(runs.run(kind, stage, ranks, *more), kind),
                              average(runs.run(kind, 1), kind)) <= 1e-6


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_no_rank_holds_more_than_its_share(runs, stage):
    folder = engine_folder(runs.run("gpt", stage, 2), "gpt")
    counts = []
    for path in sorted(folder.glob("tensor-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            counts.append(sum(file.get_tensor(name).numel() for name in sorted(file.keys()) if name.startswith("ema/")))
    network = build_on_meta(runs.recipe("gpt").model)
    total, tensors = sum(p.numel() for p in network.parameters()), len(list(network.parameters()))
    assert len(counts) == 2 and sum(counts) == total
    assert max(counts) <= total / 2 + tensors, "half, and the rounding of each parameter"


@pytest.mark.parametrize("stage", [1, 3])
def test_in_bf16_it_averages_the_float32_weights(runs, stage):
    out = runs.run("gpt", stage, 1, "training.precision=bf16")
    before, after = average(out, "gpt", STEPS - 1), average(out, "gpt")
    weights = read_weights(engine_folder(out, "gpt"))
    expected = {name: DECAY * before[name] + (1 - DECAY) * weights[name] for name in before}
    assert largest_difference(after, expected) <= 1e-6
    rounded = {name: DECAY * before[name] + (1 - DECAY) * weights[name].bfloat16().float() for name in before}
    assert largest_difference(after, rounded) > 1e-5


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_resumed_run_continues_its_average_bitwise(runs, stage):
    out = runs.run("gpt", stage)
    resumed = runs.folder / f"resumed-{stage}"
    shutil.copytree(out, resumed)
    for step in (STEPS - 1, STEPS):
        shutil.rmtree(resumed / "checkpoints" / f"step-{step:07d}")
    run_ranks(train, 1, runs.recipe("gpt"), resumed, zero_settings(stage))
    ours, theirs = average(resumed, "gpt"), average(out, "gpt")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_export_takes_the_average_unless_told_otherwise(runs, tmp_path):
    out = runs.run("gpt", 3, 2)
    mean = average(out, "gpt")
    weights = read_weights(engine_folder(out, "gpt"))
    for choice, expected in ((None, mean), ("ema", mean), ("model", weights)):
        exported = lazy_weights(convert(open_model(out, choice=choice), tmp_path / str(choice)).path)
        assert all(torch.equal(exported[name], expected[name]) for name in mean)


def test_without_an_average_none_can_be_exported(runs, tmp_path):
    out = runs.run("gpt", 1, 1, "training.ema_decay=null")
    with pytest.raises(InputError, match=r"training.ema_decay=null"):
        convert(open_model(out, choice="ema"), tmp_path / "export")
    assert not (tmp_path / "export").exists()
    convert(open_model(out), tmp_path / "export")


def test_a_missing_or_damaged_part_is_named(runs, tmp_path):
    folder = tmp_path / "gpt"
    shutil.copytree(engine_folder(runs.run("gpt", 3, 2), "gpt"), folder)
    part = folder / "tensor-000-data-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{part.name} is missing or damaged"):
        read_ema(folder)
    os.remove(part)
    with pytest.raises(InputError, match=f"{part.name} is missing or damaged"):
        read_ema(folder)
