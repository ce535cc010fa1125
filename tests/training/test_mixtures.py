"""Training on several sources: on any ranks, resumed in the middle, with figures of each validation set."""

import shutil

import pytest
from training_runs import code_shards, image_shards, prepare, start

from gigatok_ds.monitoring.metrics import of_the_machine, read_metrics

SOURCES = "[{{location: {folder}/{kind}}}, {{location: {folder}/more_{kind}, weight: 0.5}}, " \
          "{{location: {folder}/other_{kind}, weight: 0.1, name: rare}}]"
VALIDATION = "[{{location: {folder}/test_{kind}}}, {{location: {folder}/other_{kind}, name: rare}}]"
KINDS = {"tokenizer": "images", "gpt": "codes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtures")
    prepare(folder)
    image_shards(folder / "more_images", 13)
    image_shards(folder / "other_images", 5)
    code_shards(folder / "more_codes", 13, seed=2)
    code_shards(folder / "other_codes", 5, seed=3)
    for kind in KINDS:
        code, output = train(folder, kind, kind)
        assert code == 0, output
    return folder


def train(folder, kind, out, *more, ranks=1):
    places = {"folder": folder, "kind": KINDS[kind]}
    return start([folder / f"{kind}.yaml", "--out", folder / out, f"data.train={SOURCES.format(**places)}",
                  f"data.validation={VALIDATION.format(**places)}", *more], ranks=ranks)


def logged(run):
    return [{name: value for name, value in line.items() if not of_the_machine(name)} for line in read_metrics(run)]


@pytest.mark.parametrize("kind, figure", [("tokenizer", "psnr"), ("gpt", "loss")])
def test_each_validation_set_has_its_figures(folder, kind, figure):
    lines = [line for line in logged(folder / kind) if f"validation/{figure}" in line]
    assert [line["step"] for line in lines] == [4, 8]
    assert all(line[f"validation/{figure}"] != line[f"validation/{figure}.rare"] for line in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_in_the_middle_on_other_ranks(folder, kind):
    shutil.copytree(folder / kind, folder / f"{kind}-resumed")
    shutil.rmtree(folder / f"{kind}-resumed/checkpoints/step-0000008")
    code, output = train(folder, kind, f"{kind}-resumed", ranks=2)
    assert code == 0 and "resuming from" in output, output
    for ours, theirs in zip(logged(folder / f"{kind}-resumed"), logged(folder / kind), strict=True):
        for name, value in ours.items():
            if not name.startswith(("grad_norm", "term_grad")):  # see test_training
                assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), (ours["step"], name)


def test_one_place_may_be_there_twice(folder):
    places = f"[{{location: {folder}/codes, name: a}}, {{location: {folder}/codes, name: b}}]"
    code, output = start([folder / "gpt.yaml", "--out", folder / "twice", f"data.train={places}",
                          f"data.validation={folder}/test_codes"])
    assert code == 0, output


def test_other_weights_are_other_data(folder):
    code, output = train(folder, "gpt", "gpt", f"data.train=[{{location: {folder}/codes}}, "
                         f"{{location: {folder}/more_codes, weight: 2}}]")
    assert code == 2 and "data.train is not what" in output, output


def test_a_place_that_is_not_there_is_named(folder):
    code, output = train(folder, "tokenizer", "new", f"data.train=[{{location: {folder}/images}}, "
                         f"{{location: {folder}/nothing}}]")
    assert code == 2 and f"data.train is {folder}/nothing, which is not a directory" in output, output
