"""What `gigatok-ds convert` must notice, or must not mistake for damage."""

import json
import os
import re
import shutil

import pytest
import safetensors.torch
import torch
from rank_runs import run_ranks
from small_models import small_gpt
from training_runs import GPT as GPT_RECIPE
from training_runs import prepare

from gigatok_ds.checkpoint.standalone import save_standalone
from gigatok_ds.cli.main import main
from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe
from gigatok_ds.errors import InputError
from gigatok_ds.models.frozen.pretrained import fill_frozen, read_frozen_weights
from gigatok_ds.models.frozen.pretrained_files import WeightFile


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
    full = bytearray(file.read_bytes())
    full[-100] ^= 1
    file.write_bytes(full)


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
    assert "warning: 1 tensors hold values that are not finite, the first of them norm.weight" in said


def test_minus_zero_is_not_zero(model, tmp_path, capsys, monkeypatch):
    from gigatok_ds.checkpoint import verification
    from gigatok_ds.checkpoint.model_sources import open_model

    gpt = small_gpt()
    weights = {name: value.clone() for name, value in gpt.state_dict().items()}
    weights["norm.weight"][0] = 0.0
    zero = save_standalone(tmp_path / "zero", gpt.config, weights)
    weights["norm.weight"][0] = -0.0
    minus = save_standalone(tmp_path / "minus", gpt.config, weights)
    with pytest.raises(verification.InputError, match=r"norm.weight was not written as it was read"):
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


def original(folder, content):
    (folder / "gpt.yaml").write_text(GPT_RECIPE)
    if isinstance(content, dict):
        torch.save(content, folder / "c2i.pt")
    else:
        (folder / "c2i.pt").write_bytes(content)
    return (
        folder / "c2i.pt",
        folder / "out",
        "--recipe",
        folder / "gpt.yaml",
        "model.sequence_length=16",
        "model.positions=rope_2d",
    )


def gpt_weights():
    return {name: value.clone()
            for name, value in small_gpt(sequence_length=16, positions="rope_2d").state_dict().items()}


@pytest.mark.parametrize("change, said", [
    (lambda value: value.to(torch.int8), "is of type int8, but only plain float64"),
    (lambda value: value.to(torch.uint8), "is of type uint8"),
    (lambda value: value.to(torch.int64), "holds whole numbers (int64) where the model has fractions"),
    (lambda value: value.to(torch.bool), "holds whole numbers (bool)"),
    (lambda value: value.to(torch.float8_e4m3fn), "is of type float8_e4m3fn"),
    (lambda value: value.to(torch.complex64), "is of type complex64"),
    (lambda value: value.to_sparse(), "is of type sparse_coo"),
])
def test_types_that_are_no_weights_are_refused(change, said, tmp_path, capsys):
    weights = gpt_weights()
    weights["norm.weight"] = change(weights["norm.weight"])
    code, told = convert(capsys, *original(tmp_path, {"model": weights}))
    assert code == 2 and said in told and "norm.weight" in told and len(told.splitlines()) == 1, told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floating_point_types_are_converted(dtype, tmp_path, capsys):
    weights = {name: value.to(dtype) for name, value in gpt_weights().items()}
    assert convert(capsys, *original(tmp_path, {"model": weights}))[0] == 0


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_of_a_pt_that_are_not_finite_are_told(value, tmp_path, capsys):
    weights = gpt_weights()
    weights["norm.weight"][3] = float(value)
    code, told = convert(capsys, *original(tmp_path, {"model": weights}))
    assert code == 0 and "warning: 1 tensors hold values that are not finite, the first of them norm.weight" in told


@pytest.mark.parametrize("prefixes", [("", "module."), ("_orig_mod.", "module._orig_mod."), ("module.", "_orig_mod.")])
def test_names_that_become_one_are_refused(prefixes, tmp_path, capsys):
    weights = {f"{prefixes[0]}{name}": value for name, value in gpt_weights().items()}
    weights[f"{prefixes[1]}norm.weight"] = torch.zeros(32)
    code, told = convert(capsys, *original(tmp_path, {"model": weights}))
    assert code == 2 and f"holds both {prefixes[0]}norm.weight and {prefixes[1]}norm.weight" in told, told


@pytest.mark.parametrize("content, said", [
    (b"<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning", "it is a web page"),
    (b"\n  <html>", "it is a web page"), (b"", "it is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
     "it is a Git LFS pointer.*git lfs pull"),
    (b'{"error": "not found"}', "it is JSON"), (b"\x1f\x8b\x08\x00", "it is compressed"),
    ("safetensors", "it is a safetensors file"),
])
@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_what_a_download_left_instead_is_told_as_what_it_is(command, content, said, tmp_path, capsys):
    if content == "safetensors":
        content = safetensors.torch.save({"norm.weight": torch.zeros(3)})
    source, *words = original(tmp_path, content)
    code = main([str(word) for word in ([command, source, *words] if command == "convert" else [command, source])])
    told = "".join(capsys.readouterr())
    assert code == 2 and re.search(f"c2i.pt is not a checkpoint: {said}", told) and len(told.splitlines()) == 1, told


def test_a_frozen_networks_file_is_told_as_what_it_is(tmp_path):
    (tmp_path / "vgg.pth").write_bytes(b"<!doctype html>")
    file = WeightFile(setting="loss.perceptual.weights", value=tmp_path / "vgg.pth", what="VGG-16", names=("vgg.pth",))
    with pytest.raises(InputError, match=r"loss.perceptual.weights: .*vgg.pth cannot be read: it is a web page"):
        read_frozen_weights(file)


@pytest.mark.parametrize("value", [torch.tensor([1, 2]), torch.tensor([1.0, float("nan")]),
                                   torch.zeros(2).to(torch.float8_e4m3fn)])
def test_a_frozen_network_of_other_numbers_is_refused(value):
    with torch.device("meta"):
        network = torch.nn.Linear(1, 2)
    with pytest.raises(InputError, match=r"file: bias is of type .* quantized or damaged"):
        fill_frozen(network, {"weight": torch.zeros(2, 1), "bias": value}, "file")
