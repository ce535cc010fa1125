"""Standalone checkpoints: complete, checked, atomic; and the original's files, read without executing anything."""

import argparse
import json
import os
import pickle

import pytest
import torch
from small_models import small_gpt, small_gpt_config, small_tokenizer, small_tokenizer_config

from gigatok_ds import InputError, generate, load_gpt, load_tokenizer
from gigatok_ds.checkpoint import standalone
from gigatok_ds.checkpoint.original import from_original, read_original, to_original
from gigatok_ds.checkpoint.standalone import save_standalone


def test_round_trip_gives_the_same_codes_images_and_samples(tmp_path):
    tokenizer, gpt = small_tokenizer(), small_gpt()
    save_standalone(tmp_path / "tok", tokenizer.config, tokenizer.state_dict())
    save_standalone(tmp_path / "gpt", gpt.config, gpt.state_dict())
    images = torch.randn(3, 3, 16, 16)
    again = load_tokenizer(tmp_path / "tok")
    assert again.config == tokenizer.config
    assert torch.equal(again.encode(images), tokenizer.encode(images))
    codes = tokenizer.encode(images)
    assert torch.equal(again.decode(codes), tokenizer.decode(codes))
    classes = torch.tensor([0, 4])
    assert torch.equal(generate(load_gpt(tmp_path / "gpt"), classes, top_k=1), generate(gpt, classes, top_k=1))


def test_large_models_are_sharded_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(standalone, "SHARD_BYTES", 100_000)
    tokenizer = small_tokenizer()
    save_standalone(tmp_path / "tok", tokenizer.config, tokenizer.state_dict())
    index = json.loads((tmp_path / "tok" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == set(tokenizer.state_dict())
    again = load_tokenizer(tmp_path / "tok").state_dict()
    assert all(torch.equal(again[name], value) for name, value in tokenizer.state_dict().items())


def test_bfloat16_on_request(tmp_path):
    tokenizer = small_tokenizer()
    save_standalone(tmp_path / "tok", tokenizer.config, tokenizer.state_dict())
    half = load_tokenizer(tmp_path / "tok", dtype=torch.bfloat16)
    codes = half.encode(torch.randn(2, 3, 16, 16))
    assert codes.dtype == torch.int64 and half.decode(codes).dtype == torch.bfloat16


def test_an_existing_directory_is_refused_and_untouched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    tokenizer = small_tokenizer()
    with pytest.raises(InputError, match="exists already"):
        save_standalone(tmp_path / "out", tokenizer.config, tokenizer.state_dict(), overwrite=True)
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    tokenizer = small_tokenizer()
    save_standalone(tmp_path / "tok", tokenizer.config, tokenizer.state_dict())
    monkeypatch.setattr(standalone, "_write_weights", full_disk)
    for name in ("tok", "new"):
        with pytest.raises(InputError, match=r"could not be written .No space left on device.; make room"):
            save_standalone(tmp_path / name, tokenizer.config, tokenizer.state_dict(), overwrite=True)
    assert os.listdir(tmp_path) == ["tok"]
    load_tokenizer(tmp_path / "tok")


def test_damaged_or_foreign_directories_are_refused(tmp_path):
    tokenizer, gpt = small_tokenizer(), small_gpt()
    save_standalone(tmp_path / "tok", tokenizer.config, tokenizer.state_dict())
    save_standalone(tmp_path / "gpt", gpt.config, gpt.state_dict())
    with pytest.raises(InputError, match="holds a gpt, not a tokenizer"):
        load_tokenizer(tmp_path / "gpt")
    with pytest.raises(InputError, match=r"no config.json"):
        load_tokenizer(tmp_path)
    weights = tmp_path / "tok" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        load_tokenizer(tmp_path / "tok")
    weights.unlink()
    with pytest.raises(InputError, match="lacks its weights file"):
        load_tokenizer(tmp_path / "tok")


def test_an_index_cannot_point_outside_its_directory(tmp_path):
    tokenizer = small_tokenizer()
    save_standalone(tmp_path / "tok", tokenizer.config, tokenizer.state_dict())
    (tmp_path / "tok" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(tokenizer.state_dict(), "../outside.safetensors")}
    (tmp_path / "tok" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="lacks its weights file"):
        load_tokenizer(tmp_path / "tok")


def original_file(path, model, **more):
    weights = to_original(model.config, model.state_dict())
    torch.save({"model": dict(weights), "steps": 7, "args": argparse.Namespace(lr=1e-4), **more}, path)
    return path


def test_original_files_are_read_with_their_namespace_and_priority(tmp_path):
    tokenizer = small_tokenizer()
    ema = {name: value + 1 for name, value in to_original(tokenizer.config, tokenizer.state_dict()).items()}
    file = original_file(tmp_path / "t.pt", tokenizer, ema=ema)
    default, model = read_original(file, kind="tokenizer"), read_original(file, "model", kind="tokenizer")
    assert torch.equal(default["quant_conv.bias"], model["quant_conv.bias"] + 1)
    assert model["quantize.codebook_used"].dtype == torch.float32
    _, weights = from_original(tokenizer.config, model, "t.pt")
    assert all(torch.equal(weights[name], value) for name, value in tokenizer.state_dict().items())


def test_a_file_without_the_semantic_head_is_accepted(tmp_path):
    tokenizer = small_tokenizer()
    weights = to_original(tokenizer.config, tokenizer.state_dict())
    without = {name: value for name, value in weights.items() if "distill_mlp" not in name}
    config, ours = from_original(tokenizer.config, without, "t.pt")
    assert config.semantic_head is None
    save_standalone(tmp_path / "tok", config, ours)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_tokenizer(tmp_path / "tok").encode(images), tokenizer.encode(images))


def test_what_the_file_lacks_is_refused(tmp_path):
    file = original_file(tmp_path / "t.pt", small_gpt())
    with pytest.raises(InputError, match="has no ema weights; it holds args, model, steps"):
        read_original(file, "ema", kind="gpt")
    weights = read_original(file, kind="gpt")
    with pytest.raises(InputError, match=r"t.pt has another shape for output.weight: \[64, 32\], not \[65, 32\].*it is "
                                         r"not of this model"):
        from_original(small_gpt_config(vocab_size=65), weights, "t.pt")
    with pytest.raises(InputError, match=r"also holds layers.1"):
        from_original(small_gpt_config(size={"width": 32, "layers": 1, "heads": 2}), weights, "t.pt")
    with pytest.raises(InputError, match=r"lacks .* it is not of this model"):
        from_original(small_tokenizer_config(), weights, "t.pt")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_not_executed(tmp_path):
    torch.save({"model": {"a": Bomb(tmp_path / "executed")}}, tmp_path / "bomb.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    for name in ("bomb.pt", "raw.pt"):
        with pytest.raises(InputError, match="was refused"):
            read_original(tmp_path / name, kind="gpt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"])
def test_unreadable_files_are_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError):
        read_original(tmp_path / "x.pt", kind="gpt")
    with pytest.raises(InputError, match="does not exist"):
        read_original(tmp_path / "missing.pt", kind="gpt")
