"""Experiments of several commands: the published table, the guidance search, and small forms of every study."""

import json

import numpy as np
import pytest
from command_runs import figures, on_ranks, refused
from probe_world import probe_world
from small_models import small_gpt, small_tokenizer

from gigatok_ds.checkpoint.standalone import save_standalone
from gigatok_ds.cli.main import main
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.model import GPTConfig, TokenizerConfig
from gigatok_ds.errors import InputError
from gigatok_ds.kernels.build import cache_directory
from gigatok_ds.studies import stages
from gigatok_ds.studies.guidance_search import climb, next_scale, windows
from gigatok_ds.studies.published_results import ROWS, TOLERANCES
from gigatok_ds.studies.reproduction import Comparison, compare
from gigatok_ds.studies.sampling_stages import Trial

# The tables of GigaTok's README: rFID and LPIPS of tokenizers; gFID and probe accuracy of AR models.
TOKENIZERS = {"VQ_SS256": (1.01, 0.2226), "VQ_SB256": (0.89, 0.2121), "VQ_BL256": (0.81, 0.2059),
              "VQ_BL256_dino_disc": (0.51, 0.2056), "VQ_XLXXL256": (0.79, 0.1947)}
GENERATORS = {("GPT-B", "VQ_SS256"): (4.05, 62.6), ("GPT-B", "VQ_SB256"): (3.83, 62.9),
              ("GPT-B", "VQ_BL256"): (3.26, 67.6),
              ("GPT-B", "VQ_BL256_dino_disc"): (3.33, 67.7), ("GPT-B", "VQ_XLXXL256"): (3.15, 72.0),
              ("GPT-XL", "VQ_BL256"): (2.13, 70.6), ("GPT-XXL", "VQ_BL256"): (2.03, 69.4),
              ("GPT-XXL", "VQ_XLXXL256"): (1.98, 74.0)}


def test_every_published_row_has_its_preset():
    found = {row.tokenizer: (row.published["rfid_val50k"], row.published["lpips"]) for row in ROWS.values()
             if not row.gpt}
    assert found == TOKENIZERS
    found = {(row.gpt, row.tokenizer): (row.published["gfid_adm50k"], row.published["probe_top1_percent"])
             for row in ROWS.values() if row.gpt}
    assert found == GENERATORS and len(ROWS) == len(TOKENIZERS) + len(GENERATORS)


@pytest.mark.parametrize("name", ROWS)
def test_a_preset_is_complete(name):
    row = ROWS[name]
    assert isinstance(load_recipe(row.tokenizer).model, TokenizerConfig)
    assert set(row.published) <= set(TOLERANCES)
    if row.gpt:
        assert isinstance(load_recipe(row.gpt).model, GPTConfig)
        assert (row.guidance.scale is None) != (row.guidance.start is None)
        assert (row.guidance.schedule, row.guidance.window_start) == ("step", 0.18)
    documented = ROWS["GPT-B/XL-XXL"].guidance
    assert (documented.scale, documented.start) == (1.75, None)
    assert all(row.guidance.start == (2.5 if row.gpt == "GPT-B" else 1.25) for row in ROWS.values()
               if row.gpt and row.guidance.scale is None)


def test_verdicts():
    row = ROWS["B-L"]
    found = {c.name: c.verdict for c in compare(row, {"rfid_val50k": 0.835, "lpips": 0.2159})}
    assert found == {"rfid_val50k": "reproduced", "lpips": "differs"}
    assert Comparison(name="x", ours=None, published=1.0, tolerance=0.1).verdict == "not measured"


def curve(scale):
    return (scale - 2.3) ** 2


@pytest.mark.parametrize("start, down_first, expected", [
    (1.75, False, [1.75, 2.0, 2.25, 2.5]),  # 2.25 is best; then 2.5 above, 2.0 was tried below
    (3.0, False, [3.0, 3.25, 2.75, 2.5, 2.25, 2.0]),
    (3.0, True, [3.0, 2.75, 2.5, 2.25, 2.0]),
])
def test_the_hill_climb_tries_neighbours_of_the_best(start, down_first, expected):
    tried = {}
    while (scale := next_scale(tried, start, down_first=down_first)) is not None:
        tried[scale] = curve(scale)
    assert list(tried) == expected and min(tried, key=tried.get) == 2.25


def test_scales_do_not_go_below_one():
    tried = {}
    while (scale := next_scale(tried, 1.25)) is not None:
        tried[scale] = scale
    assert list(tried) == [1.25, 1.5, 1.0]


def test_rectangular_windows_are_the_grid():
    grid = windows("rectangular", None)
    assert {"window_start": 0.1, "window_end": 0.5} in grid and {"window_start": 0.8, "window_end": 1.0} in grid
    assert all(window["window_start"] < window["window_end"] for window in grid)
    assert len(grid) == sum(start < end for start in range(10, 81, 5) for end in range(50, 101, 5))
    best = climb("rectangular", 2.5, None, lambda trial: curve(trial.scale) + abs(trial.window_start - 0.3)
                 + abs(trial.window_end - 0.9))
    assert best == Trial(schedule="rectangular", scale=2.25, window_start=0.3, window_end=0.9)
    assert best.annotation == "window_start=0.30;window_end=0.90"
    assert best.name == "rectangular-window_start0.30-window_end0.90-cfg2.25"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return probe_world(tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="module")
def setting(world, tmp_path_factory):
    """world, with a sharper GPT, a reference and weights-free Inception as arguments."""
    folder = tmp_path_factory.mktemp("studies")
    gpt = small_gpt()
    save_standalone(folder / "gpt", gpt.config, gpt.state_dict())
    rng = np.random.default_rng(0)
    np.savez(folder / "reference.npz", rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    judged = ["--reference", folder / "reference.npz", "--inception", "random", "--allow", "count", "--allow",
              "reference", "--count", "6"]
    return world, folder / "gpt", judged


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache_directory().parent))  # the kernels are compiled once
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_stages_are_started_as_a_user_would(messages, setting, tmp_path, capfd):
    world, _, _ = setting
    codes = tmp_path / "codes"
    words = ["extract-codes", world / "tok", world / "val", "--crops", "center", "--out"]
    stages.Launcher(ranks=2).run([
        stages.Stage(name="codes", arguments=[*words, codes], done=codes / "metadata.json"),
        stages.Stage(name="inspection", arguments=["inspect", world / "tok"], done=None, alone=True)])
    said = capfd.readouterr().err
    assert (
        said.index("== codes") < said.index("rank 0 of 2") < said.index("== inspection") and "13 of 13 images" in said
    )


@pytest.mark.usefixtures("forked_stages")
def test_a_stage_that_fails_or_leaves_nothing_is_named(setting, tmp_path):
    world, _, _ = setting
    words = ["extract-codes", world / "tok", world / "val", "--out", tmp_path / "codes"]
    with pytest.raises(InputError, match=r"codes failed \(exit code 2\)"):
        stages.Launcher().run([stages.Stage(name="codes", arguments=[*words, "--crops", "twelve"], done=None)])
    with pytest.raises(InputError, match=r"inspection ended, but .*none is not there"):
        stages.Launcher().run([stages.Stage(name="inspection", arguments=["inspect", world / "tok"],
                                            done=tmp_path / "none")])


@pytest.mark.usefixtures("forked_stages")
def test_a_search_finishes_resumes_and_leaves_a_table(setting, tmp_path, capfd):
    world, gpt, judged = setting
    command = ["search-guidance", "--gpt", gpt, "--tokenizer", world / "tok", *judged, "--schedule", "constant",
               "--start", "1", "--out", tmp_path / "out"]
    assert on_ranks(command) == 0
    first = capfd.readouterr()
    lines = (tmp_path / "out" / "search.csv").read_text().splitlines()
    assert lines[0] == "annotation,cfg_scale,cfg_schedule,FID,Inception Score,Precision,Recall,sFID"
    rows = [line.split(",") for line in lines[1:]]
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    assert best["scale"] == min((float(row[3]), float(row[1])) for row in rows)[1] and len(rows) >= 2
    assert f"best: scale {best['scale']:g}" in first.out
    assert not list((tmp_path / "out").rglob("samples.npz")), "images are removed"
    assert on_ranks(command) == 0
    again = capfd.readouterr()
    assert again.out == first.out and "sampling," not in again.err and again.err.count(": done") == len(rows)
    assert on_ranks([*command[:-1], tmp_path / "out", "--seed", "1"]) == 2
    assert "holds a search with another seed" in capfd.readouterr().err


@pytest.mark.usefixtures("forked_stages")
def test_a_tokenizers_row(setting, tmp_path, capfd):
    world, _, _ = setting
    plain = ["reproduce", "S-S", "--tokenizer", world / "tok", "--val", world / "val", "--inception", "random", "--vgg",
             "random", "--out", tmp_path / "out"]
    assert "is not the model of the recipe VQ_SS256" in refused(capfd, *plain)
    assert not (tmp_path / "out").exists()
    allowed = [*plain, "--allow", "model", "--allow", "count"]
    assert main([str(word) for word in [*allowed, "--dry-run"]]) == 0
    assert "evaluate reconstruction" in capfd.readouterr().out
    assert main([str(word) for word in allowed]) == 1, "random models reproduce nothing"
    said = capfd.readouterr().out
    assert "rfid_val50k" in said and "not measured" in said and "differs" in said  # 13 images are not 50,000
    assert figures(tmp_path / "out")["published lpips"] == 0.2226
    assert "needs --gpt" in refused(capfd, "reproduce", "GPT-B/B-L", *plain[2:])
    assert "there is no row 'S'" in refused(capfd, "reproduce", "S")
    assert main(["reproduce"]) == 0 and "GPT-XXL/XL-XXL" in capfd.readouterr().out


@pytest.mark.usefixtures("forked_stages")
def test_a_generators_row(setting, tmp_path, capfd):
    world, gpt, judged = setting
    command = ["reproduce", "GPT-B/XL-XXL", "--tokenizer", world / "tok", "--gpt", gpt, *judged, "--allow", "model",
               "--train", world / "train", "--val", world / "val", "--probe=--epochs", "--probe=2",
               "--probe=--warmup-epochs", "--probe=1", "--probe=--batch-size", "--probe=8", "--out", tmp_path / "out"]
    assert main([str(word) for word in command]) == 1
    said = capfd.readouterr().out
    assert "probe_top1_percent" in said and "differs" in said
    found = figures(tmp_path / "out")
    assert found["published gfid_adm50k"] == 3.15 and "gfid_custom6_random" in found and "probe_top1_percent" in found
    record = json.loads((tmp_path / "out" / "generation" / "results.json").read_text())["settings"]["sampling"]
    assert record["cfg_scale"] == 1.75 and record["cfg_schedule"] == "step"
    assert record["cfg_schedule_kwargs"] == {"window_start": 0.18} and record["dtype"] == "float32"


GPT_RECIPE = """
kind: gpt
name: tiny
model: {size: {width: 32, layers: 2, heads: 2}, vocab_size: 64, sequence_length: 8, num_classes: 5}
optimizer: {lr: 1e-3}
training: {steps: 4, global_batch_size: 8, precision: fp32, log_every: 2, validate_every: 2}
checkpoint: {every: 2}
"""


@pytest.mark.usefixtures("forked_stages")
def test_ar_probing_in_one_command(setting, tmp_path, capfd):
    world, _, judged = setting
    (tmp_path / "tiny.yaml").write_text(GPT_RECIPE)
    command = ["ar-probe", world / "tok", "--train", world / "train", "--val", world / "val", *judged, "--recipe",
               tmp_path / "tiny.yaml", "--gpt", "training.steps=4", "--gpt", "training.log_every=2", "--crops", "flip",
               "--cfg", "1.5", "--probe=--epochs", "--probe=2", "--probe=--warmup-epochs", "--probe=1",
               "--probe=--batch-size", "--probe=8", "--ranks", "2", "--out", tmp_path / "out"]
    command = [str(word) for word in command]
    assert main([*command, "--dry-run"]) == 0
    planned = capfd.readouterr().out
    places = [planned.index(f"gigatok_ds {command} ") for command in ("extract-codes", "train", "convert", "probe")]
    assert places == sorted(places)
    assert "--standalone --nproc-per-node 2" in planned and not (tmp_path / "out").exists()
    assert main(command) == 0
    found = figures(tmp_path / "out")
    assert set(found) == {"gfid_custom6_random", "sfid_custom6_random", "inception_score_6_random",
                          "precision_custom6_random", "recall_custom6_random", "validation_loss", "sequences",
                          "probe_top1_percent"}
    assert found["validation_loss"] == pytest.approx(np.log(64), abs=0.3) and found["sequences"] == 13
    capfd.readouterr()
    assert main(command) == 0
    again = capfd.readouterr().err
    assert again.count(": done") == 5 and "== GPT training" not in again
    assert figures(tmp_path / "out") == found


@pytest.mark.usefixtures("forked_stages")
def test_a_failing_stage_is_named(setting, tmp_path, capfd):
    world, _, judged = setting
    command = ["ar-probe", world / "tok", "--train", world / "train", "--val", world / "val", *judged, "--crops",
               "twelve", "--out", tmp_path / "out"]
    assert main([str(word) for word in command]) == 2
    err = capfd.readouterr().err.splitlines()
    assert any("unknown crops" in line for line in err) and "train codes failed (exit code 2)" in err[-1]
    assert main([str(word) for word in [*command, "--gpt", "training.stepz=3"]]) == 2
    assert "did you mean steps" in capfd.readouterr().err


def test_models_must_match(tmp_path, setting, capsys):
    world, _, _judged = setting
    tokenizer = small_tokenizer(latent_tokens=4)
    save_standalone(tmp_path / "other", tokenizer.config, tokenizer.state_dict())
    assert "they do not match" in refused(capsys, "probe", tmp_path / "other", "--gpt", world / "gpt", "--train",
                                          world / "train", "--val", world / "val", "--out", tmp_path / "o")
