"""Which tokenizer's codes a GPT is for: written down where codes are made, and asked where both come together."""

import dataclasses
import json

import pytest
import torch
from layout_runs import train_on_a_rank
from rank_runs import run_ranks
from saved_models import save_models
from small_models import small_gpt, small_tokenizer
from training_runs import image_shards

from gigatok_ds.app.models import open_models
from gigatok_ds.checkpoint.standalone import codes_sha256, known_codes, read_config, save_standalone
from gigatok_ds.cli.main import main
from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe


def codes_of(path):
    return known_codes(read_config(path)["provenance"])


def test_it_is_of_what_codes_depend_on(tmp_path):
    tokenizer = small_tokenizer()
    weights = tokenizer.state_dict()
    first = codes_sha256(weights)
    for name, value in weights.items():
        moved = weights | {name: value + 1}
        decides = name.partition(".")[0] in ("cnn_encoder", "encoder", "quant_conv", "quantizer")
        assert (codes_sha256(moved) != first) == (decides and "codebook_used" not in name), name
    save_standalone(tmp_path / "fp32", tokenizer.config, weights)
    save_standalone(tmp_path / "bf16", tokenizer.config, weights, dtype=torch.bfloat16)
    assert codes_of(tmp_path / "fp32") == first
    assert codes_of(tmp_path / "bf16") == first  # GPTs of the one can be decoded with the other


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two tokenizers, codes of the first, and a GPT trained on them for two steps, by code shards and on the fly."""
    folder = tmp_path_factory.mktemp("codes")
    first, second, tuned = (small_tokenizer() for _ in range(3))
    second.load_state_dict(first.state_dict() | {"quant_conv.bias": first.quant_conv.bias + 1})
    tuned.load_state_dict(first.state_dict() | {"cnn_decoder.conv_in.bias": first.cnn_decoder.conv_in.bias + 1})
    save_models(folder, first=first, second=second, tuned=tuned)
    image_shards(folder / "images", 24)
    for name in ("first", "second"):
        arguments = [str(folder / name), str(folder / "images"), "--out", str(folder / f"codes-{name}")]
        assert main(["extract-codes", *arguments, "--crops", "center", "--workers", "0"]) == 0
    config = dataclasses.asdict(small_gpt().config)
    recipe = {"kind": "gpt", "name": "gpt", "model": config | {
        "vocab_size": first.config.quantizer.codebook_size, "sequence_length": first.config.latent_tokens},
        "training": {"steps": 2, "global_batch_size": 8, "precision": "fp32", "validate_every": 2},
        "schedule": {"kind": "const", "warmup_steps": 0}, "checkpoint": {"every": 2}}
    (folder / "gpt.yaml").write_text(json.dumps(recipe))
    data = {"shards": [f"data.{split}={folder / 'codes-first'}" for split in ("train", "validation")],
            "live": [f"data.tokenizer={folder / 'first'}", "data.workers=0",
                     *(f"data.{split}={folder / 'images'}" for split in ("train", "validation"))]}
    for name, more in data.items():
        run_ranks(train_on_a_rank, 1, load_recipe(folder / "gpt.yaml", more), folder / f"run-{name}", zero_settings(1))
        assert main(["convert", str(folder / f"run-{name}"), str(folder / f"gpt-{name}")]) == 0
    return folder


@pytest.mark.parametrize("name", ["shards", "live"])
def test_a_gpt_knows_whose_codes_it_was_trained_on(world, name):
    assert codes_of(world / f"gpt-{name}") == codes_of(world / "first") == codes_of(world / "tuned")
    assert codes_of(world / "first") != codes_of(world / "second")


def test_another_tokenizer_is_refused_unless_it_is_meant(world, tmp_path, capsys):
    def sample(tokenizer, *more):
        return main(["sample", "--gpt", str(world / "gpt-shards"), "--tokenizer", str(world / tokenizer), "--classes",
                     "1", "--per-class", "1", "--out", str(tmp_path / "grid.png"), *more])

    assert sample("first") == 0 and sample("tuned") == 0
    capsys.readouterr()
    assert sample("second") == 2
    assert "gpt-shards was trained on codes of another tokenizer than" in capsys.readouterr().err
    assert sample("second", "--force") == 0
    with pytest.raises(ValueError, match=r"codes of another tokenizer .*; give that one"):
        open_models([world / "gpt-shards", world / "second"])
    assert main(["probe", str(world / "second"), "--gpt", str(world / "gpt-shards"), "--train", str(world / "images"),
                 "--val", str(world / "images"), "--out", str(tmp_path / "probe")]) == 2


def test_codes_of_two_tokenizers_are_not_mixed(world, tmp_path, capsys):
    arguments = [f"data.train={world / 'codes-first'}", f"data.validation={world / 'codes-second'}"]
    assert main(["train", str(world / "gpt.yaml"), "--out", str(tmp_path / "run"), *arguments]) == 2
    assert "codes-second are of another tokenizer than those in" in capsys.readouterr().err
