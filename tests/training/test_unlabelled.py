"""Images without labels: a tokenizer trains, resumes, is measured and extracts as with them; a GPT says what it lacks.
"""

import shutil
import tarfile

import pytest
from small_shards import plain_tar
from training_runs import prepare, start

from gigatok_ds.checkpoint.conversion import convert
from gigatok_ds.checkpoint.model_sources import open_model
from gigatok_ds.cli.main import main
from gigatok_ds.monitoring.metrics import of_the_machine, read_metrics


def without_labels(shards, out):
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar
                       if not member.name.endswith(".cls")]
        plain_tar(out / path.name, [*members, *((name.replace(".png", ".txt"), b"stripes") for name, _ in members)])
    return out


def logged(run):
    return [{name: value for name, value in line.items() if not of_the_machine(name)} for line in read_metrics(run)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data with labels and without, and a run on the latter."""
    folder = tmp_path_factory.mktemp("unlabelled")
    prepare(folder)
    for name in ("images", "test_images"):
        without_labels(folder / name, folder / f"unlabelled_{name}")
    code, output = train(folder, "run")
    assert code == 0, output
    convert(open_model(folder / "run"), folder / "tokenizer")
    assert main(["extract-codes", str(folder / "tokenizer"), str(folder / "unlabelled_images"), "--crops", "center",
                 "--workers", "0", "--out", str(folder / "unlabelled_codes")]) == 0
    return folder


def train(folder, out, images="unlabelled_images", ranks=1):
    return start([folder / "tokenizer.yaml", "--out", folder / out, f"data.train={folder / images}",
                  f"data.validation={folder}/unlabelled_test_images"], ranks=ranks)


def test_labels_make_no_difference_to_a_tokenizer(folder):
    code, output = train(folder, "labelled", "images")
    assert code == 0 and logged(folder / "labelled") == logged(folder / "run"), output


def test_a_run_goes_on_in_mid_epoch_on_other_ranks(folder):
    """40 images, batches of 8: step 4 is in the first epoch."""
    shutil.copytree(folder / "run", folder / "resumed")
    shutil.rmtree(folder / "resumed/checkpoints/step-0000008")
    code, output = train(folder, "resumed", ranks=2)
    assert code == 0 and "resuming from" in output, output
    for ours, theirs in zip(logged(folder / "resumed"), logged(folder / "run"), strict=True):
        for name, value in ours.items():
            if not name.startswith(("grad_norm", "term_grad")):  # see test_training
                assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), (ours["step"], name)


def test_it_is_measured(folder, capfd):
    images = str(folder / "unlabelled_test_images")
    assert main(["evaluate", "reconstruction", str(folder / "tokenizer"), images, "--inception", "random", "--allow",
                 "count", "--out", str(folder / "figures")]) == 0, capfd.readouterr().err


@pytest.mark.parametrize("arguments", [
    ["train", "gpt.yaml", "--out", "gpt", "data.train=unlabelled_codes", "data.validation=test_codes"],
    ["train", "gpt.yaml", "--out", "gpt", "data.train=codes", "data.validation=unlabelled_codes"],
    ["train", "gpt.yaml", "--out", "gpt", "data.train=unlabelled_images", "data.validation=test_images",
     "data.tokenizer=tokenizer"],
    ["probe", "tokenizer", "--train", "unlabelled_images", "--val", "test_images", "--out", "probe"],
    ["ar-probe", "tokenizer", "--train", "unlabelled_images", "--val", "test_images", "--out", "ar-probe",
     "--reference", "none.npz", "--inception", "random"],
])
def test_what_needs_labels_is_one_line(folder, arguments, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    assert main(arguments) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert len(said) == 1 and "has no labels, which are needed here" in said[0], said
