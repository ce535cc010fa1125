"""A run goes on with the training data it began with, and all of its ranks see the same."""

import json
import shutil

import pytest
from rank_runs import RanksFailed, run_ranks
from training_runs import code_shards, prepare, start

from gigatok_ds.parallel.topology import start_process_group, stop_process_group
from gigatok_ds.training.data_record import DATA_FILE, check_identity, write_identity


def record_on_a_rank(identities, folder):
    topology = start_process_group()
    try:
        check_identity(identities[topology.rank], folder, topology)
        write_identity(identities[topology.rank], folder)
    finally:
        stop_process_group(topology)


def test_ranks_with_other_data_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(RanksFailed, match=r"InputError: data.train is not"):
        run_ranks(record_on_a_rank, 2, [{"train": "one"}, {"train": "other"}], tmp_path)
    assert not list(tmp_path.iterdir())
    run_ranks(record_on_a_rank, 2, [{"train": "one"}, {"train": "one"}], tmp_path)
    assert json.loads((tmp_path / DATA_FILE).read_text()) == {"train_sha256": "one"}


def damaged_record_on_a_rank(folder):
    (folder / DATA_FILE).write_text("{")
    record_on_a_rank([{"train": "one"}], folder)


def test_a_damaged_record_is_named(tmp_path):
    with pytest.raises(RanksFailed, match=f"{DATA_FILE} is damaged"):
        run_ranks(damaged_record_on_a_rank, 1, tmp_path)


def test_a_run_is_not_resumed_with_other_data(tmp_path):
    data = prepare(tmp_path)
    arguments = [tmp_path / "gpt.yaml", "--out", tmp_path / "run", *data["gpt"]]
    assert start(arguments)[0] == 0
    (tmp_path / "run" / "checkpoints" / "step-0000008" / "state.json").unlink()
    shutil.rmtree(tmp_path / "codes")
    code_shards(tmp_path / "codes", 40, seed=5)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, output = start(arguments)
    assert code == 2 and "Traceback" not in output, output
    assert f"data.train is not what {tmp_path / 'run'} began with" in output, output
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before, "nothing is written before the data is compared"


def test_the_same_data_elsewhere_is_the_same_data(tmp_path, monkeypatch):
    """By a relative path, by an absolute one, and moved; a run and its branch."""
    data = prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    constant = ["schedule.kind=const", "schedule.warmup_steps=0"]
    assert start(["gpt.yaml", "--out", "run", "data.train=codes", "data.validation=test_codes", *constant,
                  "training.steps=4"])[0] == 0
    (tmp_path / "run" / "checkpoints" / "step-0000004" / "state.json").unlink()
    code, output = start(["gpt.yaml", "--out", "run", *data["gpt"], *constant, "training.steps=4"])
    assert code == 0, output
    (tmp_path / "codes").rename(tmp_path / "moved")
    moved = ["data.train=moved", "data.validation=./test_codes", *constant]
    code, output = start(["gpt.yaml", "--out", "cool", "--branch-from", "run", *moved, "training.steps=5"])
    assert code == 0, output
    code_shards(tmp_path / "others", 40, seed=5)
    for changed, said in (("data.train=others", "data.train is not what run began with"),
                          ("data.validation=others", "data.validation is not what run began with")):
        code, output = start(["gpt.yaml", "--out", "other", "--branch-from", "run", *moved, changed,
                              "training.steps=5"])
        assert code == 2 and said in output and "Traceback" not in output, output
