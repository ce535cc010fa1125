"""The demo: in small form on somebody's own images, and (marked slow) in full, with its figures."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from gigatok_ds.cli.main import main

SHORT = ["--tokenizer", "training.steps=6", "--tokenizer", "checkpoint.every=3",
         "--tokenizer", "loss.adversarial.start_step=3", "--tokenizer", "schedule.warmup_steps=6",
         "--gpt", "schedule.warmup_steps=6", "--gpt", "training.steps=6", "--gpt", "training.global_batch_size=8",
         "--tokenizer", "training.global_batch_size=8"]


def demo(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "gigatok_ds", "demo", *map(str, arguments)], capture_output=True,
                          text=True, timeout=1200, env=os.environ | environment, check=False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(("dark", "light")):
        (root / name).mkdir()
        for number in range(12):
            rng = np.random.default_rng(number)
            pixels = rng.integers(128 * label, 128 * label + 128, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def short_run(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    finished = demo("--data", photos, "--out", out, *SHORT, OMP_NUM_THREADS="1")
    assert finished.returncode == 0, finished.stderr
    return out, finished


def test_a_run_on_my_own_images_is_self_contained(short_run):
    out, finished = short_run
    for name in ("report.html", "metrics.json", "verify.json", "reconstructions.png", "samples.png", "loss_curves.png",
                 "samples.npz", "data/train/index.json", "tokenizer/recipe.yaml", "tokenizer/metrics.jsonl",
                 "gpt/environment.json", "export/tokenizer/model.safetensors", "export/gpt/config.json"):
        assert (out / name).is_file(), name
    assert any((out / "tokenizer" / "events").iterdir())
    report = (out / "report.html").read_text()
    assert "24 images of 2 classes" in report and "Reconstruction PSNR" in report
    assert "targets met" not in report  # the targets are the digits'
    verify = json.loads((out / "verify.json").read_text())
    assert verify["different_codes"] == verify["different_sampled_codes"] == 0
    assert "report:" in finished.stdout


@pytest.mark.slow  # resuming a run is tested always, elsewhere
def test_running_it_again_continues_and_ends_the_same(short_run, photos):
    out, _ = short_run
    before = json.loads((out / "metrics.json").read_text())
    (out / "report.html").unlink()
    finished = demo("--data", photos, "--out", out, *SHORT, OMP_NUM_THREADS="1")
    assert finished.returncode == 0, finished.stderr
    assert "writing the train shards" not in finished.stderr
    assert json.loads((out / "metrics.json").read_text()) == before and (out / "report.html").is_file()


def test_wrong_exports_are_noticed(short_run):
    from safetensors.torch import load_file, save_file

    out, _ = short_run
    file = out / "export" / "gpt" / "model.safetensors"
    weights = load_file(file)
    try:
        save_file({name: value + 0.1 * torch.randn_like(value) for name, value in weights.items()}, file)
        finished = subprocess.run([sys.executable, "-m", "gigatok_ds.demo.verify", str(out)], capture_output=True,
                                  text=True, check=False)
        assert finished.returncode == 1
    finally:
        save_file(weights, file)


def test_what_cannot_work_is_one_line_and_leaves_things_alone(short_run, photos, tmp_path, capsys):
    out, _ = short_run
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    readonly = tmp_path / "file-in-the-way"
    readonly.write_text("")
    cases = [
        (["--data", photos, "--out", tmp_path / "precious"], "is not empty and is not a demo's directory"),
        (["--data", tmp_path / "empty", "--out", tmp_path / "o"], "empty"),
        (["--data", photos, "--out", out], "holds a demo with other data or settings"),
        (["--out", tmp_path / "o", "--tokenizer", "training.stepz=3"], "did you mean steps?"),
        (["--out", tmp_path / "o", "--ranks", "0"], "--ranks is 0"),
        (["--out", readonly / "o"], "Not a directory"),
    ]
    for arguments, words in cases:
        code = main(["demo", *map(str, arguments)])
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if "error:" in line]
        assert code == 2 and len(errors) == 1 and words in errors[0], (arguments, said)
    assert (tmp_path / "precious" / "file").read_text() == "mine" and not (tmp_path / "o").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--ranks", "2", "--zero", "2"]], ids=["one process", "two ranks"])
def test_the_full_demo_meets_its_targets_in_ten_minutes(tmp_path, more):
    start = time.monotonic()
    finished = demo("--out", tmp_path / "run", *more)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert more or time.monotonic() - start < 600
    assert re.search("8 of 8 targets met", (tmp_path / "run" / "report.html").read_text().replace("\n", " "))
