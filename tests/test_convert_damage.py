"""What `gigatok-ds convert` must notice, or must not mistake for damage."""

import json
import os
import shutil

import pytest
import torch
from rank_runs import run_ranks
from small_models import small_gpt
from training_runs import GPT as GPT_RECIPE
from training_runs import prepare

from gigatok_ds.checkpoint.standalone import save_standalone
from gigatok_ds.cli.main import main
from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe


def convert(capsys, *words):
    code = main(["convert", *map(str, words)])
    return code, "".join(capsys.readouterr())


def train(recipe, out):
    from gigatok_ds.training.run import run_training

    run_training(recipe, out, zero_settings(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a GPT without a moving average."""
    folder = tmp_path_factory.mktemp("damage")
    recipe = load_recipe(folder / "gpt.yaml", prepare(folder)["gpt"])
    run_ranks(train, 1, recipe, folder / "gpt")
    return folder / "gpt"


@pytest.fixture
def model(tmp_path):
    gpt = small_gpt()
    return save_standalone(tmp_path / "model", gpt.config, gpt.state_dict())


def flip(file):
    whole = bytearray(file.read_bytes())
    whole[-100] ^= 1
    file.write_bytes(whole)


def test_verifying_a_damaged_source_fails_and_leaves_nothing(model, tmp_path, capsys):
    flip(model / "model.safetensors")
    code, said = convert(capsys, model, tmp_path / "out", "--verify")
    assert code == 2 and "model.safetensors is damaged: its SHA-256" in said
    assert os.listdir(tmp_path) == ["model"]


def test_what_was_written_is_compared_with_its_recorded_hash(model, tmp_path, capsys, monkeypatch):
    from gigatok_ds.checkpoint import standalone

    write = standalone.write_tensors
    monkeypatch.setattr(standalone, "write_tensors", lambda *args: write(*args)[::-1])
    code, said = convert(capsys, model, tmp_path / "out", "--verify")
    assert code == 2 and "out/model.safetensors is damaged: its SHA-256" in said
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("to", ["standalone", "original"])
def test_weights_that_are_not_numbers_are_equal_to_themselves(to, tmp_path, capsys):
    gpt = small_gpt()
    weights = {name: value.clone() for name, value in gpt.state_dict().items()}
    weights["norm.weight"][0] = float("nan")
    save_standalone(tmp_path / "model", gpt.config, weights)
    code, said = convert(capsys, tmp_path / "model", tmp_path / "out", "--to", to, "--verify")
    assert code == 0 and "equal bit for bit" in said, said


def test_minus_zero_is_not_zero(model, tmp_path, capsys, monkeypatch):
    from gigatok_ds.checkpoint import verification
    from gigatok_ds.checkpoint.sources import open_model

    gpt = small_gpt()
    weights = {name: value.clone() for name, value in gpt.state_dict().items()}
    weights["norm.weight"][0] = 0.0
    zero = save_standalone(tmp_path / "zero", gpt.config, weights)
    weights["norm.weight"][0] = -0.0
    minus = save_standalone(tmp_path / "minus", gpt.config, weights)
    with pytest.raises(verification.InputError, match="norm.weight was not written as it was read"):
        verification.verify(open_model(zero), open_model(minus))


def test_a_model_is_not_converted_onto_itself(model, tmp_path, capsys):
    before = (model / "model.safetensors").read_bytes()
    for out in (model, tmp_path / "x" / ".." / "model"):
        code, said = convert(capsys, model, out, "--dtype", "bf16", "--overwrite", "--verify")
        assert code == 2 and "is what is converted" in said, said
    assert (model / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("named", [5, None, ["x"], "..", "../model.safetensors", "/etc/passwd"])
def test_an_index_that_names_no_file_of_its_directory_is_refused(named, model, tmp_path, capsys):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm.weight": named}}))
    code, said = convert(capsys, model, tmp_path / "out")
    assert code == 2 and "copy the whole directory again" in said and len(said.splitlines()) == 1, said


def test_a_description_of_an_unknown_kind_is_refused(model, tmp_path, capsys):
    description = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(description | {"kind": ["gpt"]}))
    code, said = convert(capsys, model, tmp_path / "out")
    assert code == 2 and "holds a ['gpt']" in said, said


def test_an_edited_recipe_of_a_checkpoint_is_named(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    recipe = tmp_path / "run" / "checkpoints" / "step-0000008" / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "\n")
    code, said = convert(capsys, tmp_path / "run", tmp_path / "out")
    assert code == 2 and "recipe.yaml is damaged: its SHA-256" in said, said


def test_a_checkpoint_copied_out_of_its_run_is_verified_without_the_run(run, tmp_path, capsys):
    shutil.copytree(run / "checkpoints" / "step-0000008", tmp_path / "kept" / "elsewhere" / "step-0000008")
    code, said = convert(capsys, tmp_path / "kept" / "elsewhere" / "step-0000008", tmp_path / "out", "--verify")
    assert code == 0 and "equal bit for bit" in said and "probe.npz" not in said, said


@pytest.mark.parametrize("key", ["model", "module", "state_dict"])
@pytest.mark.parametrize("mappable", [True, False], ids=["zip", "before torch 1.6"])
def test_llamagen_files_of_either_age_and_key_are_read(key, mappable, tmp_path, capsys):
    (tmp_path / "gpt.yaml").write_text(GPT_RECIPE)
    weights = small_gpt(sequence_length=16, positions="rope_2d").state_dict()
    torch.save({key: weights}, tmp_path / "c2i.pt", _use_new_zipfile_serialization=mappable)
    code, said = convert(capsys, tmp_path / "c2i.pt", tmp_path / "out", "--verify", "--recipe", tmp_path / "gpt.yaml",
                         "model.sequence_length=16", "model.positions=rope_2d")
    assert code == 0 and "equal bit for bit" in said, said
