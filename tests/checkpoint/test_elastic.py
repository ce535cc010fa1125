"""A checkpoint of any layout continues at any other, as if nothing had happened.

Some pairs of layouts always; all of them with `pytest -m slow tests/checkpoint/test_elastic.py`.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaler
from layout_runs import Layout, LayoutRuns, train_on_a_rank, use_stand_ins
from rank_runs import run_ranks
from saved_runs import read_everything
from training_runs import partitioning

from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.engine.zero_state import LiveState
from gigatok_ds.monitoring.metrics import of_the_machine, read_metrics

SAVED, STEPS = 3, 6
MORE = [f"training.steps={STEPS}", "checkpoint.every=3", "training.ema_decay=0.8", "training.validate_every=6"]
LAYOUTS = {
    "gpt": [Layout(), Layout(data=2, stage=1), Layout(tensor=2, stage=3), Layout(data=2, stage=3),
            Layout(tensor=2, data=2, stage=2), Layout(tensor=2, data=2, stage=3)],
    "tokenizer": [Layout(stage=1), Layout(data=2, stage=3), Layout(tensor=2, data=2, stage=3)],
}
PAIRS = [(kind, one, other)
         for kind, layouts in LAYOUTS.items() for one in layouts for other in layouts if one != other]
ALWAYS = [("gpt", LAYOUTS["gpt"][a], LAYOUTS["gpt"][b])
          for a, b in ((5, 0), (0, 5), (1, 2), (2, 3), (3, 4), (4, 1))] + [
    ("tokenizer", LAYOUTS["tokenizer"][a], LAYOUTS["tokenizer"][b]) for a, b in ((2, 0),)]


class Runs:
    """A run of each layout, and its continuations from the third step at others."""

    def __init__(self, folder):
        self.runs, self.folder = LayoutRuns(folder), folder

    def train(self, kind, layout, out, *more):
        run_ranks(train_on_a_rank, layout.tensor * layout.data, self.runs.recipe(kind, layout, *MORE, *more), out,
                  partitioning(layout.stage))
        return out

    def full(self, kind, layout, *more):
        out = self.folder / "-".join([kind, str(layout), *more])
        return out if out.exists() else self.train(kind, layout, out, *more)

    def continued(self, kind, layout, other, *more):
        out = self.folder / "-".join([kind, str(layout), "at", str(other), *more])
        if not out.exists():
            shutil.copytree(self.full(kind, layout, *more), out)
            shutil.rmtree(out / "checkpoints" / f"step-{STEPS:07d}")
            self.train(kind, other, out, *more)
        return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("elastic"))


def engine_folders(out, step):
    return [path.parent for path in sorted((out / "checkpoints" / f"step-{step:07d}").glob("*/engine.json"))]


def figures(out):
    """What was logged at the steps after the checkpoint."""
    return [{name: value for name, value in line.items() if not of_the_machine(name)}
            for line in read_metrics(out) if line["step"] > SAVED]


def assert_continues(runs, kind, layout, other):
    """The state is the same after the hand-over, and three steps on as in the run that went on at its own layout.

    To 1e-5 of a loss (or of 0.1, if that is more) and 1e-5 of a tensor's largest weight: other layouts add in another
    order.
    """
    full, continued = runs.full(kind, layout), runs.continued(kind, layout, other)
    for mine, theirs in zip(figures(continued), figures(full), strict=True):
        for name in theirs.keys() - {"step"}:
            if not name.startswith(("grad_norm", "term_grad")):
                assert abs(mine[name] - theirs[name]) <= 1e-5 * max(abs(theirs[name]), 0.1), (mine["step"], name)
    for ours, theirs in zip(engine_folders(continued, STEPS), engine_folders(full, STEPS), strict=True):
        (tensors, steps), (expected, expected_steps) = read_everything(ours), read_everything(theirs)
        assert tensors.keys() == expected.keys() and steps == expected_steps
        for name, value in expected.items():
            if value.is_floating_point():
                difference = (tensors[name] - value).abs().max() / value.abs().max().clamp(min=0.01)
                assert difference <= 1e-5, (ours.name, name)


@pytest.mark.parametrize("kind, layout, other", ALWAYS, ids=str)
def test_some_layouts_continue_at_some_others(runs, kind, layout, other):
    assert_continues(runs, kind, layout, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind, layout, other", [pair for pair in PAIRS if pair not in ALWAYS], ids=str)
def test_every_layout_continues_at_every_other(runs, kind, layout, other):
    assert_continues(runs, kind, layout, other)


def load_and_save(recipe, source, out, settings):
    """Hand a checkpoint to a run of another layout, and have it written at once, without a step.

    Returns what the networks of this rank compute with, by part, where no rank has a share of it only.
    """
    from gigatok_ds.checkpoint.run_directory import load_checkpoint
    from gigatok_ds.checkpoint.writer import CheckpointWriter
    from gigatok_ds.config.deepspeed import resolve_deepspeed
    from gigatok_ds.parallel.topology import start_process_group
    from gigatok_ds.training.run import open_task

    use_stand_ins()
    topology = start_process_group(tensor_size=recipe.parallel.tensor, sequence_parallel=recipe.parallel.sequence)
    settings, _ = resolve_deepspeed(settings, recipe, data_parallel_size=topology.data_size)
    _, build = open_task(recipe, topology, settings)
    task = build()
    step = load_checkpoint(source, task.engines, topology).step
    with CheckpointWriter(out, recipe.checkpoint, topology, stage=0) as writer:
        writer.save(step, 0, task.engines, {})
    if topology.tensor_size > 1 or settings["zero_optimization"]["stage"] == 3:
        return {}
    return {name: {key: value.clone() for key, value in engine.network.state_dict().items()
                   if isinstance(value, torch.Tensor)} for name, engine in task.engines.items()}


@pytest.mark.parametrize("kind, layout, other, more", [
    ("gpt", LAYOUTS["gpt"][5], LAYOUTS["gpt"][1], []),
    ("gpt", LAYOUTS["gpt"][0], LAYOUTS["gpt"][5], []),
    ("gpt", LAYOUTS["gpt"][3], LAYOUTS["gpt"][3], []),
    ("tokenizer", LAYOUTS["tokenizer"][2], LAYOUTS["tokenizer"][0], []),
    ("gpt", LAYOUTS["gpt"][3], LAYOUTS["gpt"][1], ["training.precision=bf16"]),
    ("gpt", LAYOUTS["gpt"][1], LAYOUTS["gpt"][0], ["training.precision=bf16"]),
    ("gpt", LAYOUTS["gpt"][0], LAYOUTS["gpt"][3], ["training.precision=bf16"]),
], ids=str)
def test_nothing_changes_by_being_handed_over(runs, kind, layout, other, more, tmp_path):
    """Weights, both moments, averages, buffers and counts of updates: bit for bit, whatever the layouts."""
    source = runs.full(kind, layout, *more) / "checkpoints" / f"step-{SAVED:07d}"
    networks = run_ranks(load_and_save, other.tensor * other.data, runs.runs.recipe(kind, other, *MORE, *more), source,
                         tmp_path, zero_settings(other.stage))
    handed = engine_folders(tmp_path, SAVED)
    assert {folder.name for folder in handed} == {folder.name for folder in engine_folders(source.parent.parent, SAVED)}
    for ours in handed:
        (tensors, steps), (expected, expected_steps) = read_everything(ours), read_everything(source / ours.name)
        assert steps == expected_steps and (ours.name == "discriminator" or min(steps.values()) >= SAVED)
        assert tensors.keys() == expected.keys() and {kind for kind, _ in expected} >= {"weights", "exp_avg",
                                                                                        "exp_avg_sq"}
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())
        for name, value in networks[0].get(ours.name, {}).items():
            full = expected[("weights", name) if ("weights", name) in expected else ("whole", name)]
            assert torch.equal(value, full.to(value.dtype)), "what the network computes with"


def test_a_run_that_writes_in_the_background_writes_the_same(runs):
    kind, layout = "gpt", LAYOUTS["gpt"][5]
    full = runs.full(kind, layout)
    other = runs.full(kind, layout, "checkpoint.every=1", "checkpoint.asynchronous=true")
    assert len(list((other / "checkpoints").glob("step-*"))) == STEPS
    for step in (SAVED, STEPS):
        for ours, theirs in zip(engine_folders(other, step), engine_folders(full, step), strict=True):
            assert {path.name: path.read_bytes() for path in ours.iterdir()} == {
                path.name: path.read_bytes() for path in theirs.iterdir()}


@pytest.mark.parametrize("kind, layout, more", [
    ("gpt", LAYOUTS["gpt"][5], []),
    pytest.param("tokenizer", LAYOUTS["tokenizer"][2], [], marks=pytest.mark.slow),
    ("gpt", LAYOUTS["gpt"][0], ["training.precision=bf16"]),
    ("gpt", LAYOUTS["gpt"][3], ["training.precision=bf16"]),
], ids=str)
def test_the_same_layout_continues_bit_for_bit(runs, kind, layout, more):
    full, continued = runs.full(kind, layout, *more), runs.continued(kind, layout, layout, *more)
    assert figures(continued) == figures(full)
    for ours, theirs in zip(engine_folders(continued, STEPS), engine_folders(full, STEPS), strict=True):
        for path in sorted(theirs.iterdir()):
            assert (ours / path.name).read_bytes() == path.read_bytes(), path.name


class Scaled:
    """An engine, as far as its counters go: fp16 itself does not run on CPUs."""

    def __init__(self, scaler, **counts):
        self.optimizer = SimpleNamespace(**scaler)
        self.global_steps, self.global_samples, self.skipped_steps = (counts.get(name, 0) for name
                                                                      in ("steps", "samples", "skipped"))

    def state(self):
        live = LiveState.__new__(LiveState)
        live._engine = self
        return live


def dynamic(scale, window=500):
    return DynamicLossScaler(init_scale=scale, scale_window=window, min_scale=1, delayed_shift=2,
                             consecutive_hysteresis=False)


def config(scale):
    return LossScaleConfig(torch.float16, True, 1.0, {"init_scale": scale, "scale_window": 500, "min_scale": 1})


def test_the_scale_of_an_fp16_loss_is_handed_over_between_its_two_kinds_of_keeper():
    zero, plain, bf16 = (Scaled({"loss_scaler": dynamic(2.0**16)}, steps=7, skipped=2),
                         Scaled({"loss_scale_config": config(2.0**16)}), Scaled({"loss_scaler": LossScaler(scale=1.0)}))
    vars(zero.optimizer.loss_scaler).update(cur_scale=2.0**14, cur_iter=3, last_overflow_iter=1, cur_hysteresis=1)
    kept = zero.state()._counters()
    assert {name: kept[f"scaler.{name}"] for name
            in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")} == {
        "cur_scale": 2.0**14, "cur_iter": 3, "last_overflow_iter": 1, "cur_hysteresis": 1}
    other = Scaled({"loss_scaler": dynamic(2.0**10)})
    for engine in (other, plain):
        engine.state()._set_counters(json.loads(json.dumps(kept)))
        assert (engine.global_steps, engine.skipped_steps) == (7, 2)
    assert other.state()._counters() == kept
    assert plain.optimizer.loss_scale_config.cur_scale == kept["scaler.cur_scale"]
    bf16.state()._set_counters(kept)
    assert bf16.optimizer.loss_scaler.cur_scale == 1.0 and bf16.global_steps == 7
    assert not any(name.startswith("scaler") for name in bf16.state()._counters())


def test_the_pairs_train(runs):
    """Otherwise all of this would compare things that stand still."""
    for kind, layouts in LAYOUTS.items():
        lines = [line for line in figures(runs.full(kind, layouts[0])) if "loss" in line]
        assert len({line["loss"] for line in lines}) == STEPS - SAVED
