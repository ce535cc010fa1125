"""Cool-downs that branch off a run with a constant learning rate, by training steps."""

import json
import shutil

import pytest
import torch
from rank_runs import run_ranks
from saved_runs import read_weights
from training_runs import prepare

from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe
from gigatok_ds.errors import InputError
from gigatok_ds.monitoring.metrics import of_the_machine, read_metrics
from gigatok_ds.training.branch import branch_point, check_branch, extension_note
from gigatok_ds.training.run_checks import check_run

PARTS = {"tokenizer": ("generator", "discriminator"), "gpt": ("gpt",)}
CONSTANT = ["schedule={kind: const, warmup_steps: 2}", "training.steps=6"]


def cool_down(steps, hold):
    return [f"schedule={{kind: wsd, warmup_steps: 2, decay_fraction: {(steps - hold) / steps}}}",
            f"training.steps={steps}"]


def train(recipe, out, branch_from=None, stage=1):
    from gigatok_ds.training.run import run_training

    run_training(recipe, out, zero_settings(stage), branch_from)


class Runs:
    """Runs on demand, once, with a checkpoint every other step and a moving average."""

    def __init__(self, folder):
        self.folder, self.data = folder, prepare(folder)

    def recipe(self, kind, more):
        return load_recipe(self.folder / f"{kind}.yaml", [
            "checkpoint.every=2", "training.ema_decay=0.5", *self.data[kind], *more])

    def run(self, name, kind, more, branch_from=None):
        out = self.folder / f"{kind}-{name}"
        if not out.exists():
            run_ranks(train, 1, self.recipe(kind, more), out, branch_from)
        return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("branch"))


def logged(run, first_step):
    return [{name: value for name, value in line.items() if not of_the_machine(name)}
            for line in read_metrics(run) if line["step"] >= first_step]


def weights(run, part, step):
    return read_weights(run / "checkpoints" / f"step-{step:07d}" / part)


@pytest.mark.parametrize("kind", PARTS)
def test_a_cool_down_is_bitwise_that_of_an_uninterrupted_run(runs, kind):
    trunk = runs.run("trunk", kind, CONSTANT)
    branch = runs.run("branch", kind, cool_down(8, hold=4), branch_from=trunk)
    full = runs.run("whole", kind, cool_down(8, hold=4))
    assert json.loads((branch / "branch.json").read_text()) == {"run": trunk.name, "checkpoint": "step-0000004"}
    assert logged(branch, 0) == logged(full, 5), "the branch has the steps from 5 on, and no others"
    for part in PARTS[kind]:
        ours, theirs = weights(branch, part, 8), weights(full, part, 8)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        files = [sorted((run / "checkpoints" / "step-0000008" / part).iterdir()) for run in (branch, full)]
        assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_the_rate_is_constant_before_the_branch_and_falls_after_it(runs):
    trunk = runs.run("trunk", "gpt", CONSTANT)
    branch = runs.run("branch", "gpt", cool_down(8, hold=4), branch_from=trunk)
    rates = {line["step"]: line["lr"] for run in (trunk, branch) for line in read_metrics(run) if "lr" in line}
    base = runs.recipe("gpt", []).optimizer.lr
    assert rates[4] == base
    # Iteration k takes the schedule of k - 1: 1 - sqrt(progress) over the four steps after the fourth.
    expected = [1.0, 1.0, 1 - 0.25**0.5, 1 - 0.5**0.5]
    assert [rates[step] for step in (5, 6, 7, 8)] == pytest.approx([base * share for share in expected], rel=1e-12)


def test_one_run_serves_cool_downs_of_several_lengths(runs):
    trunk = runs.run("trunk", "gpt", CONSTANT)
    short = runs.run("short", "gpt", cool_down(4, hold=2), branch_from=trunk)
    chosen = runs.run("chosen", "gpt", cool_down(8, hold=4), branch_from=trunk / "checkpoints" / "step-0000002")
    branch = runs.run("branch", "gpt", cool_down(8, hold=4), branch_from=trunk)
    assert [line["step"] for line in logged(short, 0) if "loss" in line] == [3, 4]
    assert [line["step"] for line in logged(chosen, 0) if "loss" in line] == [3, 4, 5, 6, 7, 8]
    assert logged(chosen, 5) == logged(branch, 5), "the constant phase goes on before the cool-down begins"


def test_an_interrupted_branch_continues_from_its_own_checkpoint(runs):
    branch = runs.run("branch", "gpt", cool_down(8, hold=4), branch_from=runs.run("trunk", "gpt", CONSTANT))
    resumed = runs.folder / "resumed"
    shutil.copytree(branch, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-0000008")
    run_ranks(train, 1, runs.recipe("gpt", cool_down(8, hold=4)), resumed)
    assert logged(resumed, 0) == logged(branch, 0)
    ours, theirs = weights(resumed, "gpt", 8), weights(branch, "gpt", 8)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("more, message", [
    (["schedule={kind: cosine, warmup_steps: 2}"],
     "schedule.kind is cosine, which has no phase of constant learning rate"),
    ([*cool_down(8, hold=4), "optimizer.lr=2e-3"], "must share its recipe, but optimizer.lr differ"),
    (cool_down(4, hold=1), "has no complete checkpoint of step 1 or earlier"),
    (["schedule={kind: wsd, warmup_steps: 5, decay_fraction: 0.5}", "training.steps=8"],
     "schedule.warmup_steps differ"),
])
def test_what_is_no_branch_is_refused(runs, more, message):
    with pytest.raises(InputError, match=message):
        branch_point(runs.recipe("gpt", more), runs.run("trunk", "gpt", CONSTANT))


def test_a_directory_is_one_run_or_one_branch(runs, tmp_path):
    trunk = runs.run("trunk", "gpt", CONSTANT)
    branch = runs.run("branch", "gpt", cool_down(8, hold=4), branch_from=trunk)
    recipe = runs.recipe("gpt", cool_down(8, hold=4))
    with pytest.raises(InputError, match="neither a run directory nor one of its checkpoints"):
        branch_point(recipe, tmp_path)
    with pytest.raises(InputError, match="holds a run that is not a branch"):
        check_branch(recipe, trunk, branch)
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(branch / "branch.json", begun)
    with pytest.raises(InputError, match="give --branch-from again"):
        check_branch(recipe, begun, None)


def trained(run):
    return [line for line in logged(run, 1) if "loss" in line]


def extend(recipe, out, stage=1):
    from gigatok_ds.training.run import run_training

    run_training(recipe, out, zero_settings(stage), extend=True)


@pytest.mark.parametrize("kind", ["gpt", pytest.param("tokenizer", marks=pytest.mark.slow)])
def test_a_finished_run_goes_on_as_if_it_had_been_begun_for_longer(runs, kind, tmp_path):
    """With a constant learning rate: bitwise, on other ranks within rounding; what was done is kept."""
    trunk = runs.run("trunk", kind, CONSTANT)
    more = [*CONSTANT, "training.steps=10"]
    full = runs.run("long", kind, more)
    extended = shutil.copytree(trunk, tmp_path / "extended")
    run_ranks(extend, 1, runs.recipe(kind, more), extended)
    assert trained(extended) == trained(full)  # the short run also validated at its last step
    for part in PARTS[kind]:
        assert all(torch.equal(value, weights(full, part, 10)[name])
                   for name, value in weights(extended, part, 10).items())
    events = [json.loads(line) for line in (extended / "history.jsonl").read_text().splitlines()]
    assert [(event["steps"], event["to"]) for event in events if event["event"] == "extended"] == [(6, 10)]
    assert load_recipe(str(extended / "recipe.yaml")).training.steps == 10
    run_ranks(extend, 1, runs.recipe(kind, more), extended)  # the same again: nothing is left to do
    assert trained(extended) == trained(full)


def test_what_becomes_of_the_learning_rate_is_said(runs, tmp_path, capsys):
    said = {}
    for kind in ("const", "wsd", "cosine", "cosine_v2"):
        schedule = [f"schedule={{kind: {kind}, warmup_steps: 2}}", "optimizer.lr=1e-3"]
        said[kind] = extension_note(runs.recipe("gpt", [*schedule, "training.steps=100"]),
                                    runs.recipe("gpt", [*schedule, "training.steps=200"]), 100)
        assert said[kind].startswith("100 steps become 200; the learning rate goes from ")
    assert "from 0.001 at step 100 to 0.001" in said["const"] and "--branch-from" not in said["const"]
    assert "to 0.001, for a schedule of wsd has been run down once" in said["wsd"]
    assert "to 0.000516, for a schedule of cosine" in said["cosine"]


def test_what_cannot_be_extended_is_refused(runs, tmp_path):
    trunk = runs.run("trunk", "gpt", CONSTANT)
    for more, out, said in (
            ([*CONSTANT, "training.steps=4"], trunk, "--extend-to is 4, but .* has training.steps 6 already"),
            ([*CONSTANT, "training.steps=9", "optimizer.lr=1e-2"], trunk, "optimizer.lr differ; --extend-to changes"),
            (CONSTANT, tmp_path / "none", "goes on with a run, but .*none holds none")):
        with pytest.raises(InputError, match=said):
            check_run(runs.recipe("gpt", more), out, extend=True)
    with pytest.raises(InputError, match=r"training.steps differ; .*, or go on here with --extend-to 9"):
        check_run(runs.recipe("gpt", [*CONSTANT, "training.steps=9"]), trunk)
