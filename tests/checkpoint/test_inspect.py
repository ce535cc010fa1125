"""`gigatok-ds inspect`: what each format is, how large, whether it is whole."""

import json
import shutil

import pytest
import torch
from rank_runs import run_ranks
from small_models import small_gpt, small_tokenizer
from training_runs import prepare

from gigatok_ds.checkpoint.original import to_original
from gigatok_ds.checkpoint.standalone import save_standalone
from gigatok_ds.cli.main import main
from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe


def train(recipe, out, settings):
    from gigatok_ds.training.run import run_training

    run_training(recipe, out, settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    recipe = load_recipe(folder / "gpt.yaml", [*prepare(folder)["gpt"], "training.ema_decay=0.5", "parallel.tensor=2"])
    run_ranks(train, 2, recipe, folder / "run", zero_settings(1))
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def inspect(capsys, path, *options):
    code = main(["inspect", str(path), *options])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def as_json(capsys, path, *options):
    code, said = inspect(capsys, path, "--json", *options)
    return code, json.loads(said)


def test_a_run_lists_its_checkpoints(run, capsys):
    (run / "checkpoints" / "step-0000009.partial").mkdir()
    code, said = inspect(capsys, run)
    assert code == 0
    for words in ("what: training run", "recipe: tiny_gpt", "step 4: complete", "step 8: complete",
                  "2 ranks (tensor 2, data 1, ZeRO 1), loss", "incomplete: step-0000009.partial"):
        assert words in said, said


def test_a_checkpoint_says_everything(run, capsys):
    code, found = as_json(capsys, run / "checkpoints" / "step-0000008", "--check")
    network = load_recipe(run / "recipe.yaml").model
    assert code == 0 and found["what"] == "training checkpoint" and found["complete"] and found["damaged"] is None
    assert (found["step"], found["samples"]) == (8, 64)
    assert found["topology"] == {"ranks": 2, "tensor": 2, "data": 1, "zero_stage": 1}
    from gigatok_ds.checkpoint.original import build_on_meta

    parameters = sum(parameter.numel() for parameter in build_on_meta(network).parameters())
    assert found["parts"]["gpt"] == {"parameters": parameters, "tensors": found["parts"]["gpt"]["tensors"],
                                     "adam_steps": 8, "holds": ["weights", "exp_avg", "exp_avg_sq", "ema"]}
    assert found["recipe"]["name"] == "tiny_gpt" and len(found["sha256"]["recipe.yaml"]) == 64
    size = sum(path.stat().st_size for path in (run / "checkpoints" / "step-0000008").rglob("*") if path.is_file())
    assert found["bytes"] == size


def test_what_is_not_whole_is_said(run, capsys):
    folder = run / "checkpoints" / "step-0000004"
    file = folder / "gpt" / "tensor-001-data-00000.safetensors"
    full = file.read_bytes()
    file.write_bytes(full[:-1] + bytes([full[-1] ^ 1]))
    assert inspect(capsys, run)[0] == 0, "without --check nothing is read"
    code, said = inspect(capsys, run, "--check")
    assert code == 1 and "step 4: complete" in said and f"DAMAGED: {file} is damaged" in said
    file.unlink()
    code, found = as_json(capsys, folder)
    assert code == 1 and not found["complete"] and found["damaged"].endswith("is missing")
    (folder / "state.json").unlink()
    code, found = as_json(capsys, folder)
    assert code == 1 and "not a complete training checkpoint" in found["damaged"]
    (run / "checkpoints" / "step-0000008" / "state.json").write_text("{}")
    code, said = inspect(capsys, run)
    assert code == 1 and "step-0000008: DAMAGED" in said and "incomplete: step-0000004" in said


def test_a_standalone_model(tmp_path, capsys):
    tokenizer = small_tokenizer()
    save_standalone(tmp_path / "m", tokenizer.config, tokenizer.state_dict(), dtype=torch.bfloat16,
                    provenance={"recipe": "mine"})
    code, found = as_json(capsys, tmp_path / "m", "--check")
    assert code == 0 and found["what"] == "standalone tokenizer" and found["damaged"] is None
    assert found["numbers"] == sum(value.numel() for value in tokenizer.state_dict().values())
    assert found["types"] == ["BF16", "I32"] and found["model"]["latent_tokens"] == 8
    assert found["provenance"]["recipe"] == "mine" and list(found["sha256"]) == ["model.safetensors"]
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    code, said = inspect(capsys, tmp_path / "m", "--check")
    assert code == 1 and "damaged: " in said and "model.safetensors is damaged" in said


def test_an_original_file(tmp_path, capsys):
    gpt = small_gpt()
    weights = dict(to_original(gpt.config, gpt.state_dict()))
    torch.save({"model": weights, "ema": weights, "steps": 7}, tmp_path / "x.pt")
    code, found = as_json(capsys, tmp_path / "x.pt")
    assert code == 0 and set(found["weights"]) == {"model", "ema"} and found["other"] == {"steps": 7}
    assert found["weights"]["ema"] == {"numbers": sum(value.numel() for value in weights.values()),
                                       "tensors": len(weights), "types": ["float32"]}
    code, said = inspect(capsys, tmp_path / "x.pt")
    assert code == 0 and "what: original GigaTok or LlamaGen checkpoint" in said


def test_anything_else_is_one_line(tmp_path, capsys):
    for path, message in ((tmp_path / "no", "does not exist"), (tmp_path, "is not a standalone checkpoint")):
        code, said = inspect(capsys, path)
        assert code == 2 and message in said and len(said.splitlines()) == 1
