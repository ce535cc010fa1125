"""The photographs benchmark: its crops, its verdicts on curves that are known, and all of it in a tiny form."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from benchmark_scripts import BENCHMARKS, loaded
from PIL import Image

from gigatok_ds.config.load import load_recipe
from gigatok_ds.data.transforms import decode_image
from gigatok_ds.shards.index import ShardIndex

SCRIPT = BENCHMARKS / "photographs.py"
# No frozen networks, which alone would take longer than everything else.
TINY = [
    "model.image_size=16", "model.latent_tokens=8", "model.z_channels=32", "model.semantic_head=null",
    "model.encoder={width: 32, layers: 1, heads: 2}", "model.decoder={width: 32, layers: 1, heads: 2}",
    "model.cnn={base_channels: 32, encoder_multipliers: [1, 1], decoder_multipliers: [1, 1], residual_blocks: 0}",
    "loss.semantic=null", "loss.perceptual=null", "loss.adversarial.base_channels=8", "loss.adversarial.layers=1",
]
STEPS = 10


@pytest.fixture(scope="module")
def cropping():
    with loaded("photograph_crops") as module:
        yield module


@pytest.fixture(scope="module")
def report():
    with loaded("photograph_report") as module:
        yield module


@pytest.fixture(scope="module")
def script():
    with loaded("photographs") as module:
        yield module


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(SCRIPT.with_suffix(".yaml"))


def test_the_parts_of_a_photograph_are_disjoint_and_all_of_it(cropping):
    for name in cropping.PHOTOGRAPHS:
        path = cropping.find_photograph(name)
        full = np.asarray(decode_image(path.read_bytes(), name))
        parts = cropping.split_photograph(name)
        assert np.array_equal(np.hstack([parts["train"], parts["validation"]]), full)
        assert min(parts["validation"].size) >= cropping.LEAST_SIDE
        gray = (full == full[..., :1]).all()
        assert not gray, f"{name} has no colours"


def test_crops_are_labelled_by_photograph_and_repeat(cropping):
    first, again = (list(cropping.crops("validation", 2, seed=3)) for _ in range(2))
    assert first == again
    assert [sample.label for sample in first] == 2 * list(range(len(cropping.PHOTOGRAPHS)))
    assert len({sample.image_bytes for sample in first}) == len(first)
    assert decode_image(first[0].image_bytes, "crop").size == (cropping.SIZE, cropping.SIZE)


def test_sides_of_crops_are_log_uniform(cropping, monkeypatch):
    """Half of them are below the geometric mean of the bounds, 64 and 256: 128; 4 standard errors of 1,000."""
    boxes = []
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, how, box: boxes.append(box))
    rng, image = np.random.default_rng(0), Image.new("RGB", (400, 256))
    for _ in range(1000):
        cropping.random_square(image, rng)
    left, top, right, bottom = np.array(boxes).T
    assert (right - left == bottom - top).all() and left.min() == top.min() == 0
    assert right.max() == 400 and bottom.max() == 256
    assert np.mean(right - left < 128) == pytest.approx(0.5, abs=4 * 0.5 / 1000**0.5)


def test_every_term_of_the_recipe_has_an_expectation_and_its_phase(report, recipe):
    found = {term.key: (term.expected, term.first, term.last) for term in report.terms_of(recipe)}
    loss, steps = recipe.loss, recipe.training.steps
    auxiliary, start = loss.auxiliary.end_step - 1, loss.adversarial.start_step
    full = ("falls", 1, steps)
    assert found == {
        "loss/reconstruction": full, "loss/perceptual": full, "loss/semantic": full,
        "loss/codebook": ("settles", 1, steps), "loss/commitment": ("settles", 1, steps),
        "loss/entropy": ("falls", 1, loss.quantizer.entropy_end_step - 1),
        "loss/feature": ("falls", 1, auxiliary), "loss/direct_reconstruction": ("falls", 1, auxiliary),
        "loss/direct_perceptual": ("falls", 1, auxiliary), "loss/adversarial": ("bounded", start, steps),
        "discriminator/discriminator": ("balanced", start, steps), "validation/psnr": ("rises", None, None),
        "validation/codebook_usage": ("used", None, None),
    }
    assert recipe.schedule.warmup_steps < auxiliary < start < loss.quantizer.entropy_end_step < steps


@pytest.mark.parametrize("expected, values, failure", [
    ("falls", lambda x: 1 - x, None),
    ("falls", lambda x: 1 + x, "missed"),
    ("falls", lambda x: np.where(x == 0, 9, 1 + x), "missed"),  # after the warm-up it only rises
    ("falls", lambda x: -x, None),
    ("rises", lambda x: x, None),
    ("rises", lambda x: -x, "missed"),
    ("settles", lambda x: 1 + np.sin(3 * x), None),
    ("settles", lambda x: 1 + np.sin(1.5 * x), "missed"),
    ("balanced", lambda x: 1 - x / 2, None),
    ("balanced", lambda x: 1 + x, "missed"),
    ("balanced", lambda x: np.maximum(0, 1 - 2 * x), "missed"),
    ("used", lambda x: x, None),
    ("used", lambda x: x / 3, "missed"),
    ("bounded", lambda x: 9 * np.sin(20 * x), None),
    ("bounded", lambda x: -21 * x, "missed"),
])
def test_verdicts(report, recipe, expected, values, failure):
    total = recipe.training.steps
    term = report.Term(key="k", expected=expected, first=1, last=total, weight=2.0)
    curve = values(np.linspace(0, 1, total))
    metrics = [{"step": step, "k": value} for step, value in enumerate(curve, 1)]
    assert report.judge(term, metrics, recipe).failure == failure


def test_a_term_outside_its_phase_or_missing_is_a_failure(report, recipe):
    term = report.Term(key="k", expected="falls", first=1, last=10)
    metrics = [{"step": step, "k": -step} for step in range(1, 21)]
    assert report.judge(term, metrics, recipe).failure == "active in steps 1 to 20"
    assert report.judge(term, [{"step": 1, "other": 0.0}], recipe).failure == "never logged"
    last = dataclasses.replace(term, last=20)
    assert report.judge(last, metrics, recipe).failure is None


def test_phases_keep_their_places(script, recipe, tmp_path):
    """Ten times as long: every step that the recipe counts to is ten times as far away."""
    settings = script.Run(tmp_path, []).settings(10 * recipe.training.steps)
    longer = load_recipe(SCRIPT.with_suffix(".yaml"), settings)
    assert longer.training.steps == 10 * recipe.training.steps
    assert longer.schedule.warmup_steps == 10 * recipe.schedule.warmup_steps
    assert longer.loss.auxiliary.end_step == 10 * recipe.loss.auxiliary.end_step
    assert longer.loss.adversarial.start_step == 10 * recipe.loss.adversarial.start_step
    assert longer.loss.quantizer.entropy_end_step == 10 * recipe.loss.quantizer.entropy_end_step


@pytest.mark.slow
def test_the_whole_of_it_in_a_tiny_form(script, tmp_path):
    """All phases in ten steps, and a report of them; whether the terms fall is not for so short a run to say."""
    out, docs = tmp_path / "out", tmp_path / "docs"
    command = [sys.executable, SCRIPT, "--steps", str(STEPS), "--crops", "2", "--out", out, "--docs", docs, *TINY]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode in (0, 1), finished.stderr
    text = (docs / "photographs.md").read_text()
    assert "never logged" not in text and "active in steps" not in text
    assert (finished.returncode == 1) == ("missed" in text)
    assert str(tmp_path) not in text and "loss/direct_reconstruction" in text and "loss/perceptual" not in text
    for name in ("photographs.png", "photographs-reconstructions.png"):
        with Image.open(docs / name) as picture:
            assert picture.width > 400
    assert ShardIndex.open(out / "data" / "train").classes == list(script.PHOTOGRAPHS)
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == STEPS


@pytest.mark.slow
def test_curves_of_both_optimizers_in_a_tiny_form(tmp_path):
    command = [sys.executable, BENCHMARKS / "optimizer_curves.py", "--steps", "12", "--seeds", "2", "--crops", "2",
               "--out", tmp_path, *TINY]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert finished.returncode == 0, finished.stderr
    rows = [line.split("|")[1:-1] for line in finished.stdout.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["2", "4", "6", "8", "10", "12"]
    assert rows[0][1:] == [" AdamW: loss ", " PSNR, dB ", " Muon: loss ", " PSNR, dB "]
    assert rows[-1][1] != rows[-1][3] and all(" to " in cell for cell in rows[-1][1:])
