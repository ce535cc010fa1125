"""The command line: it teaches, it is frozen, and bad input is one line and exit code 2."""

import argparse
import time

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_gpt, small_tokenizer
from training_runs import GPT

from gigatok_ds.checkpoint.original import to_original
from gigatok_ds.checkpoint.standalone import load_gpt, save_standalone
from gigatok_ds.cli.main import COMMANDS, build_parser, main


def run(capsys, *arguments):
    """Exit code and what was printed to standard error."""
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


def refused(capsys, *arguments):
    """The single error line of a command that must fail with exit code 2."""
    code, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if ": error: " in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err
    return lines[0]


# Changing the command line is a decision: change this table with it.
OPTIONS = {
    "demo": {"--out", "--data", "--ranks", "--tp", "--zero", "--tokenizer", "--gpt"},
    "recipes": {"recipe", "overrides"},
    "make-shards": {"source", "--out", "--prefix", "--samples-per-shard", "--labels", "--label-field", "--no-labels",
                    "--resize", "--quality", "--shuffle-seed", "--metadata", "--skip-bad", "--workers"},
    "check-shards": {"shards", "--no-decode", "--workers"},
    "doctor": {"--build"},
    "check-cluster": {"--hostfile", "--out", "--recipe", "--timeout", "--no-allreduce"},
    "plan": {"recipe", "overrides", "--cluster", "--gpu-spec", "--memory-gb", "--network-gbps", "--calibrate", "--zero",
             "--tp", "--json"},
    "train": {"recipe", "overrides", "--out", "--branch-from", "--extend-to", "--tp", "--inject", "--zero",
              "--deepspeed", "--auto"},
    "status": {"run_directory", "--json"},
    "replay": {"run_directory", "overrides", "--steps", "--out", "--tolerance"},
    "convert": {"source", "out", "overrides", "--to", "--recipe", "--weights", "--step", "--dtype", "--fresh", "--keep",
                "--verify", "--overwrite"},
    "inspect": {"path", "--check", "--json"},
    "export-graph": {"checkpoint", "out", "--part", "--format"},
    "extract-codes": {"tokenizer", "shards", "--out", "--crops", "--batch-size", "--samples-per-shard", "--workers",
                      "--device", "--tf32", "--orient", "--from-npy", "--codebook-size"},
    "reconstruct": {"tokenizer", "images", "--out", "--device", "--size"},
    "sample": {"--gpt", "--tokenizer", "--classes", "--count", "--out", "--per-class", "--balanced", "--cfg",
               "--cfg-schedule", "--cfg-start", "--cfg-end", "--cfg-interval", "--temperature", "--top-k", "--top-p",
               "--seed", "--batch-size", "--dtype", "--compile", "--tp", "--force", "--device"},
    "app": {"checkpoints", "--class-names", "--host", "--port", "--max-megabytes", "--max-total-megabytes",
            "--max-megapixels", "--device"},
    "evaluate": {"what", "source", "data", "--out", "--inception", "--vgg", "--reference", "--cache", "--tokenizer",
                 "--allow", "--dtype", "--orient", "--batch-size", "--workers", "--device"},
    "probe": {"tokenizer", "--gpt", "--train", "--val", "--out", "--features", "--depth", "--no-dropout", "--epochs",
              "--warmup-epochs", "--base-lr", "--batch-size", "--no-flip", "--orient", "--seed", "--workers",
              "--device"},
    "search-guidance": {"--gpt", "--tokenizer", "--reference", "--inception", "--out", "--schedule", "--start",
                        "--cfg-start",
                        "--count", "--seed", "--dtype", "--batch-size", "--keep-samples", "--allow", "--ranks",
                        "--device"},
    "reproduce": {"row", "--tokenizer", "--gpt", "--val", "--train", "--reference", "--inception", "--vgg", "--out",
                  "--count", "--probe", "--batch-size", "--allow", "--workers", "--ranks", "--device", "--dry-run"},
    "ar-probe": {"tokenizer", "--train", "--val", "--reference", "--inception", "--out", "--recipe", "--gpt", "--zero",
                 "--crops", "--cfg", "--count", "--probe", "--batch-size", "--allow", "--orient", "--workers",
                 "--ranks", "--device", "--dry-run"},
}


def test_the_command_line_is_frozen():
    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    found = {
        name: {(action.option_strings or [action.dest])[0] for action in parser._actions if action.dest != "help"}
        for name, parser in subparsers.choices.items()
    }
    assert found == OPTIONS
    assert set(COMMANDS) == set(OPTIONS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    start = time.process_time()  # whoever else uses the machine
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0 and time.process_time() - start < 1
    assert len(capsys.readouterr().out) > 200


@pytest.fixture
def models(tmp_path):
    tokenizer, gpt = small_tokenizer(), small_gpt()
    save_standalone(tmp_path / "tok", tokenizer.config, tokenizer.state_dict())
    save_standalone(tmp_path / "gpt", gpt.config, gpt.state_dict())
    return tmp_path / "tok", tmp_path / "gpt"


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_sample_writes_a_grid_of_rows(models, tmp_path, capsys):
    tokenizer, gpt = models
    arguments = ["sample", "--gpt", gpt, "--tokenizer", tokenizer, "--classes", "0,3", "--per-class", "4", "--cfg", "2"]
    assert run(capsys, *arguments, "--out", tmp_path / "a.png")[0] == 0
    assert run(capsys, *arguments, "--out", tmp_path / "b.png")[0] == 0
    assert Image.open(tmp_path / "a.png").size == (4 * 16, 2 * 16)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_images_to_shards_to_codes_and_reconstructions(models, photos, tmp_path, capsys):
    tokenizer, _ = models
    assert run(capsys, "make-shards", photos, "--out", tmp_path / "shards")[0] == 0
    codes = tmp_path / "codes"
    assert run(capsys, "extract-codes", tokenizer, tmp_path / "shards", "--out", codes, "--crops", "flip")[0] == 0
    from gigatok_ds.data.codes import CodeDataset

    assert CodeDataset.open(codes).codes.shape == (6, 2, 8)
    assert run(capsys, "reconstruct", tokenizer, photos, "--out", tmp_path / "rec")[0] == 0
    assert sorted(p.name for p in (tmp_path / "rec").rglob("*.png")) == ["0.png"] * 2 + ["1.png"] * 2 + ["2.png"] * 2
    wide = "reconstruct", tokenizer, photos, "--out", tmp_path / "wide", "--size"
    assert run(capsys, *wide, "8x24")[0] == 0
    assert {Image.open(path).size for path in (tmp_path / "wide").rglob("*.png")} == {(24, 8)}
    assert "nearest size is 8 x 24" in refused(capsys, *wide, "8x25")
    with pytest.raises(SystemExit):
        run(capsys, *wide, "24")
    assert "'24' is not a height and a width in pixels, such as 384x256" in capsys.readouterr().err


def test_a_pt_needs_the_right_recipe_and_leaves_nothing_behind(tmp_path, capsys):
    tokenizer = small_tokenizer()
    torch.save({"model": dict(to_original(tokenizer.config, tokenizer.state_dict()))}, tmp_path / "t.pt")
    out = tmp_path / "out"
    assert "it is not of this model" in refused(capsys, "convert", tmp_path / "t.pt", out, "--recipe", "VQ_SS256")
    assert "VQ_SS256" in refused(capsys, "convert", tmp_path / "t.pt", out, "--recipe", "VQ_SS25")
    assert "give --recipe" in refused(capsys, "convert", tmp_path / "t.pt", out)
    assert "has no ema weights" in refused(capsys, "convert", tmp_path / "t.pt", out, "--recipe", "VQ_SS256",
                                           "--weights", "ema")
    assert not out.exists()


def test_a_pt_may_be_of_variants_of_a_recipe(tmp_path, capsys):
    (tmp_path / "gpt.yaml").write_text(GPT)
    gpt = small_gpt(sequence_length=9, positions="rope_2d", conditioning="simple_adaln")
    torch.save({"model": gpt.state_dict()}, tmp_path / "g.pt")
    command = ["convert", tmp_path / "g.pt", tmp_path / "out", "model.sequence_length=9", "model.positions=rope_2d"]
    recipe = ["--recipe", tmp_path / "gpt.yaml"]
    assert "adaLN" in refused(capsys, *command, *recipe)
    assert run(capsys, *command, "model.conditioning=simple_adaln", *recipe, "--verify")[0] == 0
    codes, classes = torch.arange(16).view(2, 8), torch.tensor([0, 5])
    gpt.requires_grad_(False)  # as a loaded one; torch takes other products for what it will differentiate
    assert torch.equal(load_gpt(tmp_path / "out")(codes, classes), gpt(codes, classes))


def test_bad_input_is_one_line(models, photos, tmp_path, capsys):
    tokenizer, gpt = models
    grid = tmp_path / "grid.png"
    sample = ["sample", "--gpt", gpt, "--tokenizer", tokenizer, "--out", grid, "--classes"]
    assert "give class numbers" in refused(capsys, *sample, "cat")
    assert "classes must be in [0, 5)" in refused(capsys, *sample, "17")
    assert "unknown cfg_schedule 'wave'" in refused(capsys, *sample, "1", "--cfg-schedule", "wave")
    assert "holds a tokenizer, not a gpt" in refused(capsys, "sample", "--gpt", tokenizer, "--tokenizer", tokenizer,
                                                    "--classes", "1", "--out", grid)
    assert not grid.exists()
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(capsys, "make-shards", tmp_path / "empty", "--out", tmp_path / "s")
    (photos / "cat" / "0.png").write_bytes((photos / "cat" / "0.png").read_bytes()[:200])
    assert "0.png" in refused(capsys, "make-shards", photos, "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert "optimizer" in refused(capsys, "train", "demo_tokenizer", "optimiser.lr=1", "--out", tmp_path / "r")
    assert "data.train is not set" in refused(capsys, "train", "demo_tokenizer", "--out", tmp_path / "r")
    assert "is not a standalone checkpoint" in refused(capsys, "convert", tmp_path, tmp_path / "e")
    assert "unknown crops" in refused(capsys, "extract-codes", tokenizer, tmp_path, "--out", tmp_path / "c",
                                      "--crops", "twelve")
    assert not (tmp_path / "r").exists()
