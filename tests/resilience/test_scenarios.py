"""Fault scenarios that end in a checkpoint which must not be used."""

import os
import shutil
import time
from pathlib import Path

import pytest
from rank_runs import RanksFailed, run_ranks
from training_runs import prepare, start, train_with_faults

from gigatok_ds.checkpoint import run_directory
from gigatok_ds.checkpoint.run_directory import checkpoint_path, complete_checkpoints, read_state
from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe
from gigatok_ds.monitoring.history import read_history
from gigatok_ds.training.run import run_training


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with recipes, data, and a run of two ranks with checkpoints of steps 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("scenarios")
    data = prepare(folder)["gpt"]
    run_ranks(train_with_faults, 2, recipe_of(folder, data), folder / "whole", 1, [])
    return folder, data


def recipe_of(folder, data):
    return load_recipe(folder / "gpt.yaml", [*data, "checkpoint.every=2", "checkpoint.keep=9"])


def train_behind(recipe, out):
    """Train, but the second rank's file system shows new files three seconds late."""

    began, plain = time.monotonic(), Path.is_file

    def is_file(self):
        lags = run_directory.time.monotonic() - began < 3 and self.name == run_directory.STATE_FILE
        return not lags and plain(self)


    if os.environ["RANK"] == "1":
        Path.is_file = is_file
    run_training(recipe, out, zero_settings(1))


def files(out, step):
    """SHA-256 of what was trained."""
    found = read_state(checkpoint_path(out, step)).files
    return {name: digest for name, digest in found.items() if name.startswith("gpt/")}


def copy_of(runs, tmp_path, last):
    """The run as it was after `last` steps."""
    folder, _ = runs
    shutil.copytree(folder / "whole", tmp_path / "run")
    for step, path in complete_checkpoints(tmp_path / "run"):
        if step > last:
            shutil.rmtree(path)
    return tmp_path / "run"


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_between_files_and_completion_the_step_before_counts_for_all(runs, tmp_path, rank):
    folder, data = runs
    recipe, out = recipe_of(folder, data), tmp_path / "run"
    with pytest.raises(RanksFailed):
        run_ranks(train_with_faults, 2, recipe, out, 1, [f"kill-saving:rank={rank},step=5"])
    assert [step for step, _ in complete_checkpoints(out)] == [2, 4]
    assert (out / "checkpoints" / "step-0000006.partial").is_dir()
    run_ranks(train_with_faults, 2, recipe, out, 1, [])
    assert files(out, 8) == files(folder / "whole", 8)
    assert not list((out / "checkpoints").glob("*partial*"))


def test_killed_before_latest_is_written_the_newest_complete_checkpoint_counts(runs, tmp_path):
    folder, data = runs
    out = copy_of(runs, tmp_path, 6)
    (out / "checkpoints" / "latest").write_text("step-0000002\n")
    run_ranks(train_with_faults, 2, recipe_of(folder, data), out, 1, [])
    assert files(out, 8) == files(folder / "whole", 8)
    assert [line["step"] for line in read_history(out)[-3:] if line["event"] == "saved"] == [8]


@pytest.mark.parametrize("damaged", ["a flipped bit", "cut off", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(runs, tmp_path, damaged):
    folder, data = runs
    out = copy_of(runs, tmp_path, 6)
    newest = checkpoint_path(out, 6)
    victim = newest / "state.json" if damaged == "state.json" else newest / "gpt" / "tensor-000-data-00001.safetensors"
    full = victim.read_bytes()
    victim.write_bytes(full[:-9] if damaged == "cut off" else full[:-9] + bytes([full[-9] ^ 1]) + full[-8:])
    run_ranks(train_with_faults, 2, recipe_of(folder, data), out, 1, [])
    told, = [line for line in read_history(out) if line["event"] == "damaged"]
    assert str(victim) in told["reason"]
    assert files(out, 6) == files(folder / "whole", 6) and files(out, 8) == files(folder / "whole", 8)


def test_when_every_checkpoint_is_damaged_the_run_does_not_begin_anew(runs, tmp_path):
    folder, data = runs
    out = copy_of(runs, tmp_path, 2)
    (checkpoint_path(out, 2) / "gpt" / "tensor-000-data-00001.safetensors").unlink()
    code, output = start([folder / "gpt.yaml", "--out", out, *data, "checkpoint.every=2", "checkpoint.keep=9"])
    assert code == 2 and "is missing; restore it from a copy" in output, output


def test_ranks_that_see_a_checkpoint_late_wait_for_it(runs, tmp_path):
    folder, data = runs
    out = copy_of(runs, tmp_path, 6)
    run_ranks(train_behind, 2, recipe_of(folder, data), out)
    assert not [line for line in read_history(out) if line["event"] == "damaged"]
    assert files(out, 8) == files(folder / "whole", 8)


def test_a_rank_that_never_sees_the_checkpoint_does_not_hang_the_others(runs, tmp_path):
    folder, data = runs
    out = copy_of(runs, tmp_path, 6)
    run_ranks(train_blind, 2, recipe_of(folder, data), out)
    told, = [line for line in read_history(out) if line["event"] == "damaged"]
    assert "step-0000006 is not a complete training checkpoint" in told["reason"]
    assert files(out, 8) == files(folder / "whole", 8)


def train_blind(recipe, out):
    """Train, but the second rank never sees the checkpoint of step 6 that the first sees."""

    plain = Path.is_file
    run_directory.SEEN_SECONDS = 1.0
    if os.environ["RANK"] == "1":
        Path.is_file = lambda self: plain(self) and not (self.name == "state.json" and "step-0000006" in str(self))
    run_training(recipe, out, zero_settings(1))
