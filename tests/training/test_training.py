"""Training as users start it: stages and ranks agree, a resumed run continues bitwise, switches switch."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT
from saved_runs import read_weights
from training_runs import prepare, start

from gigatok_ds import load_gpt, load_tokenizer
from gigatok_ds.checkpoint.conversion import convert
from gigatok_ds.checkpoint.model_sources import open_model
from gigatok_ds.monitoring.metrics import of_the_machine, read_metrics

PARTS = {"tokenizer": "generator", "gpt": "gpt"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directory, data arguments, and one finished single-process ZeRO-1 run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    data = prepare(folder)
    for kind in PARTS:
        code, output = train(folder, data, kind, kind)
        assert code == 0, output
    return folder, data


def train(folder, data, kind, out, *more, ranks=1):
    return start([folder / f"{kind}.yaml", "--out", folder / out, *data[kind], *more], ranks=ranks)


def results(run):
    """What a run logged, without what depends on the machine."""
    return [{name: value for name, value in line.items() if not of_the_machine(name)} for line in read_metrics(run)]


def final_weights(folder, kind):
    return read_weights(folder / "checkpoints" / "step-0000008" / PARTS[kind])


def assert_same_training(ours, theirs, kind, tolerance):
    """Losses of every step, and what the trained models give for the same inputs; a GPT's weights, too.

    Some of a tokenizer's parameters have a true gradient of zero (whatever a group norm of one channel takes out
    again, the decoder's first queries, biases of attention keys): Adam turns their rounding noise into steps of the
    learning rate's size, so they differ while the models do not; and gradient norms with them, which test_layouts and
    test_tokenizer_step compare where that cannot be.
    """
    for mine, other in zip(read_metrics(ours), read_metrics(theirs), strict=True):
        for name in mine:
            if name in other and not name.startswith(("grad_norm", "term_grad")) and not of_the_machine(name):
                # An adversarial term is a mean of logits of order one, and may itself be close to zero.
                assert mine[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), (mine["step"], name)
    mine, other = (dict(np.load(run / "probe.npz")) for run in (ours, theirs))
    for name in mine:
        np.testing.assert_allclose(mine[name], other[name], rtol=0, atol=10 * tolerance, err_msg=name)
    if kind == "gpt":
        reference = final_weights(theirs, kind)
        for name, value in final_weights(ours, kind).items():
            assert (value - reference[name]).abs().max().item() <= tolerance, name


@pytest.mark.parametrize("kind", PARTS)
def test_a_run_directory_explains_itself(runs, kind):
    folder = runs[0] / kind
    names = set(os.listdir(folder))
    assert {"recipe.yaml", "deepspeed.json", "environment.json", "metrics.jsonl", "events", "checkpoints",
            "probe.npz"} <= names
    assert json.loads((folder / "deepspeed.json").read_text())["gradient_clipping"] > 0
    assert sorted(os.listdir(folder / "checkpoints")) == ["latest", "step-0000004", "step-0000008"]


def test_switches_switch_at_their_steps(runs):
    lines = {line["step"]: line for line in read_metrics(runs[0] / "tokenizer") if "loss" in line}

    def active(name):
        return [step for step in range(1, 9) if name in lines[step]]

    assert active("loss/adversarial") == active("discriminator/discriminator") == [4, 5, 6, 7, 8]
    assert active("loss/direct_reconstruction") == active("loss/feature") == [1, 2, 3, 4, 5]
    assert active("loss/direct_adversarial") == active("discriminator/direct_discriminator") == [4, 5]
    assert active("loss/entropy") == [1, 2, 3, 4, 5, 6]
    assert [lines[step]["lr"] for step in (1, 2, 3, 4)] == pytest.approx([1e-3, 1e-5, 5.05e-4, 1e-3])


@pytest.mark.parametrize("kind, stage", [
    pytest.param("tokenizer", 0, marks=pytest.mark.slow), ("tokenizer", 3), ("gpt", 2), ("gpt", 3),
])
def test_every_stage_trains_alike(runs, kind, stage):
    folder, data = runs
    out = f"{kind}-zero{stage}"
    code, output = train(folder, data, kind, out, "--zero", stage)
    assert code == 0, output
    assert_same_training(folder / out, folder / kind, kind, 2e-5)


@pytest.mark.parametrize("kind, stage", [
    pytest.param("tokenizer", 1, marks=pytest.mark.slow), pytest.param("tokenizer", 3, marks=pytest.mark.slow),
    ("gpt", 2),
])
def test_bf16_stays_close_to_fp32(runs, kind, stage):
    """Within the rounding of bfloat16 (8 bits) over eight steps: pixels, since another code here and there moves the
    terms of the quantizer more."""
    folder, data = runs
    out = f"{kind}-bf16-{stage}"
    code, output = train(folder, data, kind, out, "--zero", stage, "training.precision=bf16")
    assert code == 0, output
    for mine, other in zip(read_metrics(folder / out), read_metrics(folder / kind), strict=True):
        name = "loss/reconstruction" if kind == "tokenizer" else "loss"
        if name in mine:
            assert mine[name] == pytest.approx(other[name], rel=0.05)


@pytest.mark.parametrize("kind, stage", [pytest.param("tokenizer", 3, marks=pytest.mark.slow), ("gpt", 1)])
def test_two_ranks_train_like_one(runs, kind, stage):
    folder, data = runs
    code, output = train(folder, data, kind, f"{kind}-pair", "--zero", stage, ranks=2)
    assert code == 0, output
    assert_same_training(folder / f"{kind}-pair", folder / kind, kind, 2e-5)


@pytest.mark.parametrize("kind", PARTS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(runs, kind):
    folder, data = runs
    resumed = folder / f"{kind}-resumed"
    shutil.copytree(folder / kind, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-0000008")
    (resumed / "checkpoints" / "step-0000009.partial").mkdir()
    code, output = train(folder, data, kind, resumed.name)
    assert code == 0 and "resuming from" in output, output
    reference = final_weights(folder / kind, kind)
    assert all(torch.equal(value, reference[name]) for name, value in final_weights(resumed, kind).items())
    assert results(resumed) == results(folder / kind)


@pytest.mark.parametrize("kind, load", [("tokenizer", load_tokenizer), ("gpt", load_gpt)])
def test_an_export_gives_what_the_trained_model_gave(runs, kind, load):
    folder = runs[0]
    convert(open_model(folder / kind), folder / f"export-{kind}")
    model = load(folder / f"export-{kind}")
    probe = dict(np.load(folder / kind / "probe.npz"))
    if kind == "tokenizer":
        codes = model.encode(torch.from_numpy(probe["images"]))
        assert (codes.numpy() == probe["codes"]).all()
        np.testing.assert_allclose(model.decode(codes).numpy(), probe["reconstruction"], atol=1e-5)
    else:
        logits = model(torch.from_numpy(probe["codes"])[:, :-1], torch.from_numpy(probe["classes"]))
        np.testing.assert_allclose(logits.detach().numpy(), probe["logits"], atol=1e-5)


def test_what_cannot_work_is_refused_before_training(runs):
    folder, data = runs
    code, output = train(folder, data, "gpt", "gpt", "optimizer.lr=1.0")
    assert code == 2 and "was started with another recipe: optimizer.lr" in output
    code, output = train(folder, data, "gpt", "new", "model.vocab_size=65")
    assert code == 2 and "has codebook_size 64, but tiny_gpt expects 65" in output
    code, output = train(folder, data, "gpt", "new2", "model.num_classes=4")
    assert code == 2 and "label" in output and "Traceback" not in output
    code, output = train(folder, data, "tokenizer", "new3", "training.global_batch_size=64")
    assert code == 2 and "global_batch_size" in output


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True,
                             check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_run_with_one_line_and_spares_what_was_there(runs, small_disk):
    folder, data = runs
    (small_disk / "precious").write_text("mine")
    code, output = train(folder, data, "gpt", small_disk / "run", "checkpoint.every=2")
    errors = [line for line in output.splitlines() if "error:" in line]
    assert code == 2 and len(errors) == 1 and "earlier checkpoints are untouched" in errors[0], output
    assert (small_disk / "precious").read_text() == "mine"
    assert not list(small_disk.rglob("*.partial"))
    assert all((path / "state.json").is_file() for path in (small_disk / "run" / "checkpoints").glob("step-*"))


def test_a_checkpoint_with_code_in_it_is_not_executed(runs, tmp_path):
    folder, data = runs
    bombed = folder / "bombed"
    shutil.copytree(folder / "gpt", bombed)
    shutil.rmtree(bombed / "checkpoints" / "step-0000008")

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for file in (bombed / "checkpoints" / "step-0000004" / "gpt").glob("*.safetensors"):
        torch.save({"weights": Bomb()}, file)
    code, output = train(folder, data, "gpt", "bombed")
    assert code != 0 and not (tmp_path / "executed").exists(), output


def test_what_a_notebook_does_is_as_the_page_says(runs, tmp_path, monkeypatch):
    """The example of docs/evaluation.md, as it is, on a small run under the same names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo" / "data").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "tokenizer").symlink_to(runs[0] / "tokenizer")
    (tmp_path / "runs" / "demo" / "data" / "test").symlink_to(runs[0] / "test_images")
    page = ROOT / "docs" / "evaluation.md"
    example = page.read_text().partition("## From Python")[2].partition("```python\n")[2].partition("```")[0]
    found = {}
    exec(example, found)
    assert "equal bit for bit" in found["verified"] and (tmp_path / "results" / "results.html").is_file()
    assert {"psnr", "lpips", "rfid_val11_random"} <= found["results"].figures.keys()
    assert found["tokenizer"] == Path("checkpoints/tokenizer")
