"""Every byte region of every file of a checkpoint, damaged in turn: resuming detects it, or goes on exactly as from the
whole one.
"""

import json
import random
import shutil

import pytest
from one_rank import ALONE
from rank_runs import run_ranks
from training_runs import prepare, start, train_with_faults

from gigatok_ds.checkpoint.run_directory import STATE_FILE, checkpoint_path, damage, read_state
from gigatok_ds.config.load import load_recipe
from gigatok_ds.monitoring.history import read_history

SETTINGS = ["checkpoint.every=2", "checkpoint.keep=9"]
RANKS = {"gpt": 2, "tokenizer": 1}
DAMAGE = {
    "the first byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "a byte in the middle": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1])
    + data[len(data) // 2 + 1 :], "the last byte": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "a byte less": lambda data: data[:-1],
    "half of it": lambda data: data[: len(data) // 2],
    "nothing left": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "a byte more": lambda data: data + b"\0",
    "absent": lambda data: None,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Recipes, data, and of each kind of recipe a run with checkpoints of steps 2, 4, 6 and 8: the GPT's of two ranks.
    """
    folder = tmp_path_factory.mktemp("damaged")
    data = prepare(folder)
    for kind, ranks in RANKS.items():
        run_ranks(train_with_faults, ranks, recipe_of(folder, data, kind), folder / kind, 1, [])
    return folder, data


def recipe_of(folder, data, kind):
    return load_recipe(folder / f"{kind}.yaml", [*data[kind], *SETTINGS])


def change(path, how):
    data = DAMAGE[how](path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", RANKS)
def test_damage_anywhere_is_detected_or_means_the_same(kind, runs):
    """The same: the state says the same, and all that it names has its bytes; nothing else is there to be read."""
    folder = checkpoint_path(runs[0] / kind, 6)
    state, undetected = read_state(folder), []
    assert {str(path.relative_to(folder)) for path in files_below(folder)} == {STATE_FILE, *state.files}
    for path in files_below(folder):
        full = path.read_bytes()
        for how in DAMAGE:
            change(path, how)
            problem = damage(folder, ALONE)
            if problem is None:
                assert path.name == STATE_FILE and read_state(folder) == state, (path, how)
                undetected.append(how)
            else:
                assert str(path) in problem or (path.name == STATE_FILE and str(folder) in problem), (path, how,
                                                                                                      problem)
            path.write_bytes(full)
    assert damage(folder, ALONE) is None
    assert undetected == ["a byte less"]  # the new line at its end


def losses(run):
    """What was logged of each step last."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): value for line in lines for name, value in line.items() if "loss" in name}


def check_resumed(runs, out, kind, path, how):
    """A run that had come to step 6, and lost something of that checkpoint: its end is that of the one left in peace.
    """
    folder, data = runs
    shutil.copytree(folder / kind, out)
    shutil.rmtree(checkpoint_path(out, 8))
    change(checkpoint_path(out, 6) / path, how)
    run_ranks(train_with_faults, RANKS[kind], recipe_of(folder, data, kind), out, 1, [])
    told = [line["reason"] for line in read_history(out) if line["event"] == "damaged"]
    unseen = path == STATE_FILE and how in ("a byte less", "absent")  # the same, or no checkpoint at all
    assert len(told) == (not unseen) and (unseen or path in told[0]), (path, how, told)
    assert losses(out) == losses(folder / kind)
    full, resumed = (read_state(checkpoint_path(place, 8)).files for place in (folder / kind, out))
    trained = [name for name in full if "/" in name]
    assert trained and all(full[name] == resumed[name] for name in trained), (path, how)


def cases(runs, kind):
    folder = checkpoint_path(runs[0] / kind, 6)
    return [(str(path.relative_to(folder)), how) for path in files_below(folder) for how in DAMAGE]


@pytest.mark.parametrize("kind", RANKS)
def test_a_resumed_run_ends_as_if_nothing_had_been_damaged(kind, runs, tmp_path):
    chosen = [(STATE_FILE, "a byte less"), *random.Random(kind).sample(cases(runs, kind), 1)]
    for number, (path, how) in enumerate(chosen):
        check_resumed(runs, tmp_path / str(number), kind, path, how)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RANKS)
def test_after_any_damage_a_resumed_run_ends_as_if_there_had_been_none(kind, runs, tmp_path):
    for number, (path, how) in enumerate(cases(runs, kind)):
        check_resumed(runs, tmp_path / str(number), kind, path, how)
        shutil.rmtree(tmp_path / str(number))


@pytest.mark.slow
def test_what_lies_beside_checkpoints_changes_no_resumed_run(runs, tmp_path):
    """Of a run directory, each other file, damaged or absent: one line that names it, or the same end."""
    folder, data = runs
    full = folder / "gpt"
    names = [*sorted(path.name for path in full.iterdir() if path.is_file()), "checkpoints/latest"]
    assert {"recipe.yaml", "data.json", "history.jsonl", "metrics.jsonl", "heartbeat.json"} <= set(names)
    arguments = [folder / "gpt.yaml", *data["gpt"], *SETTINGS]
    shutil.copytree(full, tmp_path / "one")
    shutil.rmtree(checkpoint_path(tmp_path / "one", 8))
    for name in names:
        for how in ("half of it", "absent"):
            out = tmp_path / f"{name.replace('/', '-')} {how}"
            shutil.copytree(tmp_path / "one", out)
            change(out / name, how)
            code, said = start([*arguments, "--out", out])
            assert "Traceback" not in said and code in (0, 2), (name, how, said)
            if code == 2:
                assert name in said.splitlines()[-1], (name, how, said)
            else:
                assert {key: value for key, value in losses(out).items() if key[0] > 6} == pytest.approx(
                    {key: value for key, value in losses(full).items() if key[0] > 6}, rel=1e-5), (name, how)
