"""A GPT keeps what its classes are called, from training to export, and labels of other data are those of the same
names.
"""

import json
import shutil

import numpy as np
import pytest
from small_models import small_gpt, small_tokenizer
from small_shards import packed
from training_runs import prepare, start

import gigatok_ds
from gigatok_ds import InputError, load_gpt
from gigatok_ds.app.models import open_models
from gigatok_ds.checkpoint.class_names import ClassNames, class_numbers
from gigatok_ds.checkpoint.standalone import CONFIG_FILE, read_config, save_standalone
from gigatok_ds.cli.main import main
from gigatok_ds.data.codes import CodeSample, write_code_shards
from gigatok_ds.monitoring.metrics import read_metrics

NAMES = ["ant", "bee", "cat", "dog", "elk"]
SHORT = ["training.steps=2", "checkpoint.every=2", "training.validate_every=2", "schedule.warmup_steps=0"]


def codes(folder, numbers, names=NAMES, images=40):
    """The same images in the same order, always: numbers[i] is the label of those of NAMES[i]."""
    rng = np.random.default_rng(0)
    samples = [CodeSample(key=f"k{i}", codes=rng.integers(0, 10, (2, 8)) + 10 * (i % 5), label=numbers[i % 5])
               for i in range(images)]
    write_code_shards(samples, folder, codebook_size=64, latent_tokens=8, provenance={}, classes=names)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Code shards of the same images: as the model numbers them, backwards, without names, and with a foreign class."""
    folder = tmp_path_factory.mktemp("codes")
    codes(folder / "same", range(5))
    codes(folder / "backwards", [4, 3, 2, 1, 0], NAMES[::-1])
    codes(folder / "unnamed", range(5), names=None)
    codes(folder / "foreign", range(5), [*NAMES[:4], "fox"])
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run of a GPT, with a checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("run")
    prepare(folder)
    code, output = start([folder / "gpt.yaml", "--out", folder / "run", *of(data, "same"), *SHORT])
    assert code == 0, output
    return folder / "run"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer, gpt = small_tokenizer(), small_gpt()
    save_standalone(folder / "tok", tokenizer.config, tokenizer.state_dict())
    save_standalone(folder / "gpt", gpt.config, gpt.state_dict(), classes=NAMES)
    save_standalone(folder / "old", gpt.config, gpt.state_dict())
    return folder


def of(data, name):
    return [f"data.train={data / name}", f"data.validation={data / name}"]


def command(capsys, *words):
    code = main([*map(str, words)])
    return code, "".join(capsys.readouterr())


def losses(run):
    return [line.get("loss", line.get("validation/loss")) for line in read_metrics(run)
            if {"loss", "validation/loss"} & line.keys()]


# Kept


def test_names_go_from_the_data_into_the_run_its_checkpoints_and_its_export(run, tmp_path, capsys):
    checkpoint = run / "checkpoints" / "step-0000002"
    assert (
        json.loads((run / "classes.json").read_text()) == json.loads((checkpoint / "classes.json").read_text()) == NAMES
    )
    assert command(capsys, "convert", run, tmp_path / "gpt", "--verify")[0] == 0
    assert read_config(tmp_path / "gpt")["classes"] == load_gpt(tmp_path / "gpt").class_names == NAMES
    for path in (run, tmp_path / "gpt"):
        assert "classes: 5 names, from ant to elk (--json)" in command(capsys, "inspect",
                                                                       checkpoint if path == run else path)[1]
        found = json.loads(command(capsys, "inspect", path, "--json")[1])
        assert (found["checkpoints"][0] if path == run else found)["classes"] == NAMES


def test_a_checkpoint_whose_names_were_changed_is_damaged(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-0000002" / "classes.json").write_text('["bee"]')
    code, said = command(capsys, "convert", tmp_path / "run", tmp_path / "gpt")
    assert code == 2 and "classes.json is damaged" in said and not (tmp_path / "gpt").exists()


def test_data_without_names_leaves_a_model_without(models, tmp_path, capsys):
    assert "classes" not in json.loads((models / "old" / CONFIG_FILE).read_text())
    assert list(load_gpt(models / "old").class_names) == []
    assert "classes:" not in command(capsys, "inspect", models / "old")[1]


def test_names_go_through_the_hub_and_a_conversion(models, tmp_path, capsys):
    gigatok_ds.HubGPT.from_pretrained(models / "gpt").save_pretrained(tmp_path / "hub")
    assert command(capsys, "convert", tmp_path / "hub", tmp_path / "bf16", "--dtype", "bf16")[0] == 0
    assert read_config(tmp_path / "bf16")["classes"] == NAMES


@pytest.mark.parametrize("classes, said",
                         [(["a"] * 6, "names 6 classes of a model that has 5"), ("ant", "classes is 'ant'"),
                                           ([1], "classes\\[0\\] is 1"), (None, "classes is None")])
def test_a_description_with_other_names_is_refused(models, tmp_path, classes, said):
    shutil.copytree(models / "gpt", tmp_path / "gpt")
    description = json.loads((tmp_path / "gpt" / CONFIG_FILE).read_text())
    (tmp_path / "gpt" / CONFIG_FILE).write_text(json.dumps(description | {"classes": classes}))
    with pytest.raises(InputError, match=said):
        load_gpt(tmp_path / "gpt")


# Evaluation


def evaluated(capsys, gpt, location, out, *more):
    code, said = command(capsys, "evaluate", "loss", gpt, location, "--out", out, *more)
    assert code == 0, said
    return json.loads((out / "results.json").read_text())["figures"]["validation_loss"]


def test_a_loss_is_of_the_classes_of_the_same_names(models, data, tmp_path, capsys):
    found = {name: evaluated(capsys, models / "gpt", data / name, tmp_path / name) for name
             in ("same", "backwards", "unnamed")}
    assert found["same"] == found["backwards"] == found["unnamed"]
    by_number = evaluated(capsys, models / "old", data / "backwards", tmp_path / "old")
    assert by_number != pytest.approx(found["same"], rel=1e-4), "a model without names takes labels as they are"
    code, said = command(capsys, "evaluate", "loss", models / "gpt", data / "foreign", "--out", tmp_path / "no")
    assert code == 2 and "has a class 'fox' (1 such) that" in said and "gpt does not have" in said


def test_a_loss_on_images_too(models, tmp_path, capsys):
    packed(tmp_path, "two", ["bee", "dog"])
    with_tokenizer = ("--tokenizer", models / "tok")
    named = {place: evaluated(capsys, models / "gpt", tmp_path / place, tmp_path / f"of-{place}", *with_tokenizer)
             for place in ("two", "two-files")}
    by_number = evaluated(capsys, models / "old", tmp_path / "two", tmp_path / "old", *with_tokenizer)
    assert named["two"] == named["two-files"] != pytest.approx(by_number, rel=1e-4)
    packed(tmp_path, "three", ["bee", "fox"])
    code, said = command(capsys, "evaluate", "loss", models / "gpt", tmp_path / "three", *with_tokenizer, "--out",
                         tmp_path / "no")
    assert code == 2 and "has a class 'fox'" in said


# Going on with other data


def fine_tuned(run, data, name, out, capsys, *more, ranks=1):
    """The exit code and words of a run that goes on from `run` with that data."""
    convert = ["convert", run, out, "--to", "training", "--recipe", run.parent / "gpt.yaml", *of(data, name), *SHORT,
               *more]
    assert command(capsys, *convert)[0] == 0
    return start([out / "recipe.yaml", "--out", out], ranks)


def test_fine_tuning_learns_classes_by_their_names(run, data, tmp_path, capsys):
    for name, ranks in (("same", 1), ("backwards", 2)):
        code, output = fine_tuned(run, data, name, tmp_path / name, capsys, ranks=ranks)
        assert code == 0, output
        assert json.loads((tmp_path / name / "checkpoints" / "step-0000002" / "classes.json").read_text()) == NAMES
    assert losses(tmp_path / "same") == pytest.approx(losses(tmp_path / "backwards"), rel=1e-5)
    code, output = fine_tuned(run, data, "foreign", tmp_path / "foreign", capsys)
    assert code == 2 and "has a class 'fox' (1 such) that" in output and "classes.json does not have" in output, output


def test_a_fresh_embedding_of_classes_has_the_names_of_the_new_data(run, data, tmp_path, capsys):
    code, output = fine_tuned(run, data, "foreign", tmp_path / "run", capsys, "--fresh", "cls_embedding")
    assert code == 0, output
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == [*NAMES[:4], "fox"]


def test_a_run_and_its_branch_go_on_with_the_names_that_it_began_with(run, data, tmp_path, capsys):
    constant = ["schedule.kind=const"]
    code, output = fine_tuned(run, data, "backwards", tmp_path / "run", capsys, *constant)
    assert code == 0, output
    before = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000002")
    code, output = start([tmp_path / "run" / "recipe.yaml", "--out", tmp_path / "run"])
    assert code == 0 and "resuming from" in output, output
    assert losses(tmp_path / "run")[-len(before):] == before
    code, output = start([tmp_path / "run" / "recipe.yaml", "--out", tmp_path / "branch", "training.steps=3",
                          "--branch-from", tmp_path / "run"])
    assert code == 0, output
    assert json.loads((tmp_path / "branch" / "classes.json").read_text()) == NAMES


# Sampling


def test_classes_are_asked_for_by_name_or_number(models, tmp_path, capsys):
    sample = ["sample", "--tokenizer", models / "tok", "--per-class", "2", "--gpt"]
    for number, words in enumerate(("bee,elk", "1, 4", "1,elk")):
        assert command(capsys, *sample, models / "gpt", "--classes", words, "--out", tmp_path / f"{number}.png")[0] == 0
    assert len({(tmp_path / f"{number}.png").read_bytes() for number in range(3)}) == 1
    for gpt, words, said in (("gpt", "bee,fox", "has no class 'fox' (its classes are called 'ant', ..., 'elk')"),
                             ("old", "bee", "has no class 'bee' (it names none); give class numbers"),
                             ("gpt", "", "no class ''")):
        code, output = command(capsys, *sample, models / gpt, "--classes", words, "--out", tmp_path / "no.png")
        assert code == 2 and said in output and len(output.splitlines()) == 1
    with pytest.raises(InputError, match="gpt has two classes called 'crane'; give the number"):
        class_numbers(["crane"], ClassNames(["crane", "ant", "crane"], "gpt"))


def test_the_page_calls_classes_what_the_gpt_calls_them(models, tmp_path):
    assert open_models([models / "tok", models / "gpt"]).class_names == [f"{i}: {name}" for i, name in enumerate(NAMES)]
    gpt = small_gpt()
    save_standalone(tmp_path / "gpt", gpt.config, gpt.state_dict(), classes=NAMES[:2])
    assert open_models([models / "tok", tmp_path / "gpt"]).class_names == ["0: ant", "1: bee", "2", "3", "4"]
