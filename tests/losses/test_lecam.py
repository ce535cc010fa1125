"""LeCam regularization: against a plain loop, over micro batches and ranks, and through interruptions of a run."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from rank_runs import run_ranks
from training_runs import partitioning, prepare

from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.losses import AdversarialConfig
from gigatok_ds.losses import lecam
from gigatok_ds.losses.composition import build_discriminator
from gigatok_ds.losses.lecam import LeCam
from gigatok_ds.monitoring.metrics import read_metrics

START, STEPS = 4, 8


def logits(seed, mean):
    return torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(seed)) + mean


def test_the_running_means_settle_and_then_average():
    """Until 1000 steps after the start they are the step's own; from then on 0.99 of what they were."""
    ours, expected = LeCam(start_step=50), None
    for step in [50, 51, 1049, 1050, 1051, 1052]:
        real, fake = logits(step, 1.0), logits(step + 1, -2.0)
        ours.update(real, fake, step)
        means = [real.mean().item(), fake.mean().item()]
        expected = means if step < 1050 else [0.99 * old + 0.01 * new for old, new in zip(expected, means, strict=True)]
        assert ours.mean_logits.tolist() == pytest.approx(expected, abs=1e-6), step


def test_the_penalty_is_the_published_one():
    ours, real, fake = LeCam(start_step=0), logits(0, 0.5), logits(1, -0.5)
    ours.update(logits(2, 1.0), logits(3, -1.0), step=0)
    mean_real, mean_fake = ours.mean_logits.tolist()
    expected = F.relu(real - mean_fake).pow(2).mean() + F.relu(mean_real - fake).pow(2).mean()
    torch.testing.assert_close(ours.penalty(real, fake), expected, rtol=1e-6, atol=0)


def test_the_penalty_pulls_both_sides_together_and_the_means_take_no_gradient():
    ours, real, fake = LeCam(start_step=0), logits(0, 3.0).requires_grad_(), logits(1, -3.0).requires_grad_()
    ours.update(real, fake, step=0)
    ours.penalty(real, fake).backward()
    assert not ours.mean_logits.requires_grad
    assert (real.grad >= 0).all() and real.grad.sum() > 0, "descent lowers real logits"
    assert (fake.grad <= 0).all() and fake.grad.sum() < 0
    together = LeCam(start_step=0)
    together.update(torch.zeros(4), torch.zeros(4), step=0)
    assert together.penalty(torch.zeros(4), torch.zeros(4)) == 0


@pytest.mark.parametrize("offset", [0, 2000])
def test_micro_batches_of_a_step_count_as_one_batch(offset):
    full, parts = LeCam(start_step=1), LeCam(start_step=1)
    for step in range(1 + offset, 4 + offset):
        real, fake = logits(step, 1.0), logits(step + 1, -2.0)
        full.update(real, fake, step)
        for ours, theirs in zip(real.chunk(2), fake.chunk(2), strict=True):
            parts.update(ours, theirs, step)
        torch.testing.assert_close(parts.mean_logits, full.mean_logits, rtol=0, atol=1e-6)


def test_half_precision_logits_are_averaged_in_float32():
    ours = LeCam(start_step=0)
    ours.update(torch.full((70_000,), 1.0, dtype=torch.float16), torch.full((70_000,), 3e4, dtype=torch.float16), 0)
    assert ours.mean_logits.tolist() == pytest.approx([1.0, 30_000.0])
    assert ours.penalty(torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.float16)).dtype == torch.float32


def test_the_discriminator_carries_the_means_only_when_they_are_wanted():
    plain = AdversarialConfig(start_step=7, base_channels=8, layers=2)
    regularized = AdversarialConfig(start_step=7, base_channels=8, layers=2, lecam_weight=0.001)
    torch.manual_seed(0)
    without = build_discriminator(plain, image_size=16)
    torch.manual_seed(0)
    network = build_discriminator(regularized, image_size=16)
    assert without.lecam is None and network.lecam.start_step == 7
    ours, theirs = network.state_dict(), without.state_dict()
    assert ours.keys() - theirs.keys() == {"lecam.mean_logits"}
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


# Whole runs


def train_with_means(recipe, out, stage):
    """A run whose running means average from the discriminator's second step on; its means at each checkpoint."""
    from gigatok_ds.engine import engine
    from gigatok_ds.training import run

    lecam.SETTLING_STEPS = 1
    means = []
    snapshot = engine.Engine.snapshot

    def saving(self):
        if getattr(self.network, "lecam", None) is not None:
            assert self.network.lecam.mean_logits.dtype == torch.float32
            means.append(self.network.lecam.mean_logits.tolist())
        return snapshot(self)

    engine.Engine.snapshot = saving
    run.run_training(recipe, out, partitioning(stage))
    return means


class Runs:
    def __init__(self, folder):
        self.folder, self.data, self.finished = folder, prepare(folder)["tokenizer"], {}

    def recipe(self, *more):
        # A large epsilon, or Adam would make steps of rounding noise.
        return load_recipe(self.folder / "tokenizer.yaml", [
            "loss.adversarial.lecam_weight=0.5", f"loss.adversarial.start_step={START}", "optimizer.eps=1e-3",
            *self.data, *more])

    def run(self, name, *more, ranks=1, stage=1):
        """(means of each rank at each checkpoint, logged LeCam terms by step, the run's directory)."""
        out = self.folder / name
        if name not in self.finished:
            self.finished[name] = run_ranks(train_with_means, ranks, self.recipe(*more), out, stage)
        lines = [line for line in read_metrics(out) if "loss" in line]
        return self.finished[name], {line["step"]: line.get("discriminator/lecam") for line in lines}, out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("lecam"))


def test_the_term_begins_a_step_after_the_discriminator(runs):
    _, terms, _ = runs.run("single")
    assert [step for step, value in terms.items() if value is not None] == list(range(START + 1, STEPS + 1))
    assert all(value > 0 for value in terms.values() if value is not None)


def test_the_term_changes_what_is_learned(runs):
    _, without, out = runs.run("off", "loss.adversarial.lecam_weight=0")
    assert set(without.values()) == {None}
    name = "discriminator/discriminator"
    ours, theirs = ([line[name] for line in read_metrics(folder) if name in line]
                    for folder in (runs.run("single")[2], out))
    assert ours[:2] == theirs[:2] and ours[2] != theirs[2]


@pytest.mark.parametrize("name, more, ranks, stage", [
    ("data", [], 2, 2),
    ("tensor", ["parallel.tensor=2"], 2, 1),
    pytest.param("stage3", [], 2, 3, marks=pytest.mark.slow),
])
def test_every_layout_has_the_means_of_all_images(runs, name, more, ranks, stage):
    (alone,), expected, _ = runs.run("single")
    means, terms, _ = runs.run(name, *more, ranks=ranks, stage=stage)
    assert means[0] == means[1], "bitwise alike on all ranks"
    assert len(alone) == 2 and means[0][-1] == pytest.approx(alone[-1], rel=0, abs=1e-6)  # logits are of order 0.1
    for step, value in expected.items():
        # A GAN amplifies rounding: about threefold a step here, over six of them.
        assert terms[step] == (None if value is None else pytest.approx(value, rel=1e-4)), step


@pytest.mark.parametrize("stage, precision", [
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, "fp32"), (3, "fp32"), (1, "bf16"))),
])
def test_a_resumed_run_continues_with_its_means(runs, stage, precision):
    name, more = f"stage{stage}-{precision}", [f"training.precision={precision}", "checkpoint.every=6"]
    (means,), terms, out = runs.run(f"{name}-whole", *more, stage=stage)
    resumed = runs.folder / f"{name}-resumed"
    shutil.copytree(out, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step-{STEPS:07d}")
    (again,), terms_again, _ = runs.run(resumed.name, *more, stage=stage)
    assert len(again) == 1 and again == means[1:], "continued after the first checkpoint, with its means"
    assert terms_again == terms
