"""What a real run says while it trains: warnings, speeds, previews; on one rank, on two, and when resumed."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from rank_runs import run_ranks
from small_models import small_tokenizer
from training_runs import prepare

from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.losses import QuantizerLossConfig
from gigatok_ds.data.loader import evaluation_batches
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.image_metrics import to_uint8
from gigatok_ds.monitoring.loss_term_gradients import TermGradients
from gigatok_ds.monitoring.metrics import of_the_machine, read_metrics
from gigatok_ds.monitoring.previews import preview_grid
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.shards.index import ShardIndex

WATCHED = [
    "loss.reconstruction.weight=0.0", "loss.quantizer.commitment=0.0", "model.quantizer.codebook_size=8",
    "training.log_every=2", "monitor={dead_term_steps: 3, collapse_usage: 0.999, preview_images: 5, peak_tflops: 0.5}",
]


def train(recipe, out, stage):
    from gigatok_ds.training.run import run_training

    run_training(recipe, out, zero_settings(stage))


class Runs:
    def __init__(self, folder):
        self.folder, self.data = folder, prepare(folder)

    def run(self, kind, name, *overrides, ranks=1, stage=1):
        recipe = load_recipe(self.folder / f"{kind}.yaml", [*self.data[kind], *overrides])
        run_ranks(train, ranks, recipe, self.folder / name, stage)
        return self.folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("watch"))
    runs.run("tokenizer", "single", *WATCHED)
    return runs


def warnings(out):
    return [(line["step"], line["warning"]) for line in read_metrics(out) if "warning" in line]


def test_terms_without_weight_and_a_small_codebook_are_warned_about_once(runs):
    told = warnings(runs.folder / "single")
    assert [(step, text.split(" is dead")[0].split(" has ")[0]) for step, text in told] == [
        (4, "the term commitment"), (4, "the term direct_reconstruction"), (4, "the term reconstruction"),
        (4, "the codebook")]
    assert "for 4 steps its gradient norm has been below 1e-06" in told[0][1]


def test_speeds_are_logged_with_every_logging_step(runs):
    lines = [line for line in read_metrics(runs.folder / "single") if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    for line in lines:
        assert line["throughput/images_per_second"] == pytest.approx(8 / line["throughput/step_seconds"])
        assert 0 <= line["throughput/data_wait"] <= 1
        assert line["mfu"] == pytest.approx(line["throughput/tflops_per_gpu"] / 0.5)
        assert line["hfu"] > line["mfu"] * (1 - 1e-9) > 0
        assert 1 <= line["codebook_perplexity"] <= 8


def test_previews_show_images_above_what_became_of_them(runs):
    folder = runs.folder / "single" / "previews"
    assert sorted(path.name for path in folder.iterdir()) == ["step-0000004.png", "step-0000008.png"]
    picture = np.asarray(Image.open(folder / "step-0000008.png"))
    assert picture.shape == (2 * 16 + 2, 5 * 16 + 4 * 2, 3)
    index = ShardIndex.open(runs.folder / "test_images")
    images = to_uint8(next(iter(evaluation_batches(index, 16, 5)))["images"]).permute(0, 2, 3, 1).numpy()
    made = to_uint8(torch.from_numpy(np.load(runs.folder / "single" / "probe.npz")["reconstruction"]))
    for number in range(5):
        columns = slice(number * 18, number * 18 + 16)
        assert (picture[:16, columns] == images[number]).all()
        # Batches of another size round otherwise.
        assert np.abs(picture[18:, columns].astype(int) - made[number].permute(1, 2, 0).numpy()).max() <= 1


def test_previews_are_in_tensorboard(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs.folder / "single" / "events"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("preview")] == [4, 8]


@pytest.mark.parametrize("name, stage, more", [
    pytest.param("data", 3, [], marks=pytest.mark.slow), ("tensor", 1, ["parallel.tensor=2"])])
def test_two_ranks_say_what_one_says(runs, name, stage, more):
    """All that does not depend on the machine, gradient norms of terms among it, while rounding has not grown yet."""
    out = runs.run("tokenizer", name, *WATCHED, *more, ranks=2, stage=stage)
    for ours, theirs in zip(read_metrics(out), read_metrics(runs.folder / "single"), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"warning"}:
            if ours["step"] <= 4 and not of_the_machine(key):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), (ours["step"], key)
    pictures = [np.asarray(Image.open(run / "previews" / "step-0000004.png")).astype(int)
                for run in (out, runs.folder / "single")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_micro_batches_do_not_change_the_norms_of_what_is_a_mean_over_images(runs):
    # Without the discriminator, whose batch statistics are of a micro batch.
    options = ["loss.adversarial=null", "loss.quantizer.entropy=0.0", "training.steps=2"]
    full = runs.run("tokenizer", "whole", *options)
    parts = runs.run("tokenizer", "parts", *options, "training.micro_batch_size=2", stage=2)
    names = ("reconstruction", "direct_reconstruction", "feature", "codebook", "commitment")
    for ours, theirs in zip(read_metrics(parts)[:2], read_metrics(full)[:2], strict=True):
        for name in names:
            assert ours[f"term_grad/{name}"] == pytest.approx(theirs[f"term_grad/{name}"], rel=1e-4), name


def test_what_the_engine_multiplies_a_loss_with_is_taken_out():
    """As fp16 and accumulation do, which the CPU's engine cannot: loss scaling and one part in A."""
    norms = []
    for factor in (1.0, 2.0**16 / 3):
        network = small_tokenizer().train()
        topology = Topology(rank=0, world_size=1, device=torch.device("cpu"), data_rank=0, data_size=1)
        gradients = TermGradients(network.quantizer, QuantizerLossConfig(), topology, 1)
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        output = gradients.watch(network(images, entropy="global", semantic=True))
        losses = output.quantizer_losses
        terms = {"codebook": losses.codebook, "commitment": 0.25 * losses.commitment, "entropy": losses.entropy,
                 "feature": output.decoded_feature.square().mean(), "semantic": output.semantic_feature.mean()}
        (factor * (sum(terms.values()) + gradients.scale_probe)).backward()
        norms.append({name: value.item() for name, value in gradients.take(terms, 16).items()})
    assert norms[0].keys() == {f"term_grad/{name}" for name in terms} and norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert norms[0]["term_grad/semantic"] == pytest.approx(1 / output.semantic_feature.numel(), rel=1e-5)


def test_a_resumed_run_repeats_no_warning_and_may_be_watched_otherwise(runs):
    resumed = runs.folder / "resumed"
    shutil.copytree(runs.folder / "single", resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-0000008")
    runs.run("tokenizer", "resumed", *WATCHED, "monitor.preview_images=0")
    assert warnings(resumed) == warnings(runs.folder / "single")


def test_a_gpt_counts_sequences(runs):
    out = runs.run("gpt", "gpt", "monitor.peak_tflops=0.5")
    lines = [line for line in read_metrics(out) if "loss" in line]
    assert all(line["throughput/sequences_per_second"] > 0 and line["mfu"] > 0 for line in lines)
    assert not (out / "previews").exists()


@pytest.mark.parametrize("kind, setting, said", [
    ("tokenizer", "dead_term_steps=0", "monitor.dead_term_steps is 0; it must be at least 1"),
    ("tokenizer", "collapse_usage=1.0", "monitor.collapse_usage is 1.0; it must be at least 0 and below 1"),
    ("tokenizer", "preview_images=-1", "monitor.preview_images is -1; it must be at least 0"),
    ("gpt", "peak_tflops=0", "monitor.peak_tflops is 0.0; it must be above 0, or null"),
    ("gpt", "wandb_project=''", "monitor.wandb_project is empty"),
    ("gpt", "preview_images=4", "unknown key monitor.preview_images"),
])
def test_settings_that_cannot_be_are_refused(runs, kind, setting, said):
    with pytest.raises(InputError, match=re.escape(said)):
        load_recipe(runs.folder / f"{kind}.yaml", [*runs.data[kind], f"monitor.{setting}"])


def test_a_grid_fills_its_last_row():
    images = torch.linspace(-1, 1, 11)[:, None, None, None].expand(11, 3, 4, 4)
    grid = preview_grid(images, -images)
    assert grid.shape == (4 * 4 + 3 * 2, 8 * 4 + 7 * 2, 3)
    rows = grid[::6, ::6, 0]
    assert (rows[0] == to_uint8(images[:8, 0, 0, 0]).numpy()).all()
    assert (rows[3, :3] == to_uint8(-images[8:, 0, 0, 0]).numpy()).all() and (rows[2:, 3:] == 255).all()
