"""A trained model goes on at another size: a tokenizer on larger images, a GPT on more codes."""

import re

import pytest
from training_runs import code_shards, prepare, start

from gigatok_ds.cli.main import main
from gigatok_ds.monitoring.metrics import read_metrics

MORE = ["training.steps=12", "training.validate_every=12", "checkpoint.every=12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    prepare(folder)
    for split in ("codes", "test_codes"):
        code_shards(folder / f"longer_{split}", 20, seed=4, tokens=32)
    return folder


def data(folder, kind):
    return [f"data.train={folder / kind}", f"data.validation={folder}/test_{kind}"]


def figure(run, name):
    return [line[name] for line in read_metrics(run) if name in line][-1]


@pytest.mark.parametrize("kind, before, after, name", [
    ("tokenizer", "images", ["images", "model.image_size=32", "model.latent_tokens=16"], "validation/psnr"),
    ("gpt", "codes", ["longer_codes", "model.sequence_length=32"], "validation/loss"),
])
def test_it_goes_on_and_improves(folder, kind, before, after, name, capsys):
    recipe = str(folder / f"{kind}.yaml")
    code, output = start([recipe, "--out", folder / kind, *data(folder, before), *MORE])
    assert code == 0, output
    arguments = ([*data(folder, "images")] if kind == "tokenizer" else [
        f"data.train={folder}/longer_codes", f"data.validation={folder}/longer_test_codes"])
    assert main(["convert", str(folder / kind), str(folder / f"{kind}-larger"), "--to", "training", "--recipe", recipe,
                 *after[1:], *arguments, *MORE]) == 0
    said = capsys.readouterr()
    assert "positional_embedding: " in said.err
    if kind == "tokenizer":  # what it is measured on may be away
        assert main(["convert", str(folder / kind), str(folder / "elsewhere"), "--to", "training", "--recipe", recipe,
                     *after[1:], arguments[0], f"data.validation={folder}/nothing"]) == 0
        err = capsys.readouterr().err
        assert "warning: what it makes of images before any step is not known" in err and "Traceback" not in err
    run = folder / f"{kind}-larger"
    code, output = start([run / "recipe.yaml", "--out", run])
    assert code == 0, output
    if kind == "tokenizer":
        first = re.search(r"PSNR of 8 validation images before any step: ([0-9.]+) dB", said.out)
        assert figure(run, name) > float(first[1])
    else:
        scratch = folder / "scratch"
        code, output = start([recipe, "--out", scratch, *after[1:], *arguments, *MORE])
        assert code == 0 and figure(run, name) < figure(scratch, name), output
