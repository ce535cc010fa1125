"""Runs that are asked to stop save once and can go on; runs that stall end by themselves with everyone's stacks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_processes import ranks_below, wait_for
from rank_runs import RanksFailed, run_ranks
from saved_runs import read_everything
from training_runs import forget_shared_memory, launch, prepare, start, train_with_faults

from gigatok_ds.checkpoint.run_directory import complete_checkpoints
from gigatok_ds.cli.main import main
from gigatok_ds.config.load import load_recipe
from gigatok_ds.monitoring.history import read_history
from gigatok_ds.resilience.preemption import REQUEUE
from gigatok_ds.training.run_status import status

LONG = ["training.steps=100000", "training.validate_every=100000", "checkpoint.every=100000", "schedule.kind=const"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    return folder, prepare(folder)["gpt"]


def logged(out):
    metrics = out / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


def events(out):
    return [line["event"] for line in read_history(out)]


def newest(out):
    step, folder = complete_checkpoints(out)[-1]
    return step, read_everything(folder / "gpt")[0]


@pytest.mark.parametrize("signals", [
    pytest.param([signal.SIGTERM], marks=pytest.mark.slow), pytest.param([signal.SIGUSR1], marks=pytest.mark.slow),
    pytest.param([signal.SIGHUP], marks=pytest.mark.slow),  # always: two ranks, below
    pytest.param([signal.SIGTERM, signal.SIGTERM], marks=pytest.mark.slow),
], ids=["SIGTERM", "SIGUSR1", "SIGHUP", "SIGTERM twice"])
def test_one_process_saves_once_and_goes_on_bitwise(data, tmp_path, signals):
    folder, names = data
    command = [folder / "gpt.yaml", "--out", tmp_path / "run", *names]
    job = launch([*command, *LONG], 1)
    wait_for(lambda: logged(tmp_path / "run") > 2 or job.poll() is not None, 120)
    asked = time.monotonic()
    for number in signals:
        job.send_signal(number)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == REQUEUE and time.monotonic() - asked < 30, output
    assert f"stopped by {signals[0].name}" in output and "Traceback" not in output
    assert events(tmp_path / "run") == ["started", "saved", "stopped"]
    (step, stopped), = [(step, folder) for step, folder in complete_checkpoints(tmp_path / "run")]
    assert not list((tmp_path / "run" / "checkpoints").glob("*partial*"))
    steps = [f"training.steps={step + 3}", *LONG[1:]]
    assert start([folder / "gpt.yaml", "--out", tmp_path / "whole", *names, *steps])[0] == 0
    # The length of a run is part of its recipe, so the stopped run goes on as a branch of itself.
    assert start([folder / "gpt.yaml", "--out", tmp_path / "rest", *names, *steps, "--branch-from", stopped])[0] == 0
    (whole_step, full), (rest_step, rest) = newest(tmp_path / "whole"), newest(tmp_path / "rest")
    assert whole_step == rest_step == step + 3 and full.keys() == rest.keys()
    assert all(torch.equal(full[name], rest[name]) for name in full)


@pytest.mark.parametrize("number", [signal.SIGHUP, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_before_the_first_step_there_is_nothing_to_save(data, tmp_path, number):
    """A run that is asked while it begins ends at once, as asked; so it is not taken for a fault, and not tried again.
    """
    folder, names = data
    command = [folder / "gpt.yaml", "--out", tmp_path / "run", *names]
    job = launch(command, 1)
    wait_for(lambda: "started" in events(tmp_path / "run") or job.poll() is not None, 120)
    job.send_signal(number)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == REQUEUE and "Traceback" not in output, output
    assert f"stopped by {number.name}" in output and events(tmp_path / "run")[-1] == "stopped"
    assert status(tmp_path / "run")["state"] == "stopped"
    code, said = start(command)
    assert code == 0 and events(tmp_path / "run")[-1] == "finished", said


def test_a_signal_to_one_of_two_ranks_stops_both(data, tmp_path):
    folder, names = data
    job = launch([folder / "gpt.yaml", "--out", tmp_path / "run", *names, *LONG], 2)
    try:
        wait_for(lambda: logged(tmp_path / "run") > 2 or job.poll() is not None, 200)
        ranks = ranks_below(job.pid)
        os.kill(ranks[1], signal.SIGUSR1)
        output, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    assert "stopped by SIGUSR1" in output and "died" not in output, output[-3000:]
    assert job.returncode == REQUEUE
    assert events(tmp_path / "run") == ["started", "saved", "stopped"]
    found = status(tmp_path / "run")
    assert found["state"] == "stopped" and found["newest_checkpoint"] and len(found["faults"]) == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stalled_rank_ends_all_with_everyones_stacks(data, tmp_path, rank):
    folder, names = data
    recipe = load_recipe(folder / "gpt.yaml", [*names, "monitor.stall_seconds=8"])
    began = time.monotonic()
    with pytest.raises(RanksFailed, match="exit code 1"):
        run_ranks(train_with_faults, 2, recipe, tmp_path / "run", 1, [f"hang:rank={rank},step=3"])
    assert time.monotonic() - began < 90
    stacks = [(tmp_path / "run" / "stacks" / f"rank-0000{number}.txt").read_text() for number in range(2)]
    assert "at step 3 for more than 8 s" in stacks[rank] and "fault_injection.py" in stacks[rank]
    assert ", number " in stacks[1 - rank] and "not finished" in stacks[1 - rank], "the collective that it waits in"
    assert "train_micro_batch" in stacks[1 - rank], "it waits for the other in a collective of its step"
    failed = [line for line in read_history(tmp_path / "run") if line["event"] == "failed"]
    assert len(failed) == 1 and "monitor.stall_seconds" in failed[0]["reason"]
    assert status(tmp_path / "run")["state"] == "failed"


@pytest.mark.slow  # a data worker that is killed is tested always
def test_a_data_worker_that_stops_ends_the_run_too(data, tmp_path):
    folder, names = data
    code, output = start([folder / "gpt.yaml", "--out", tmp_path / "run", *names, "monitor.stall_seconds=6",
                          "data.workers=1", "--inject", "hang-worker:step=3", *LONG])
    assert code == 1 and "monitor.stall_seconds" in output, output
    assert "throughput.py" in (tmp_path / "run" / "stacks" / "rank-00000.txt").read_text(), "it waits for data"


def test_a_data_worker_that_is_killed_is_named(data, tmp_path):
    folder, names = data
    code, output = start([folder / "gpt.yaml", "--out", tmp_path / "run", *names, "data.workers=1",
                          "--inject", "kill-worker:step=3", *LONG])
    # torch says the one or the other: whether its handler of the signal or its queue sees it first.
    said = re.search(r"DataLoader worker \(pid(?:\(s\))? (\d+)\) (is killed by signal|exited unexpectedly)", output)
    assert code == 1 and said, output
    forget_shared_memory(said[1])


def test_a_stall_in_c_code_that_holds_the_interpreter_ends_too(tmp_path):
    script = """
import ctypes, sys
from pathlib import Path
from gigatok_ds.resilience import watchdog
watchdog.BACKSTOP_SECONDS = 1.0
with watchdog.Watchdog(1.0, Path(sys.argv[1]), 0, lambda text, code: None) as dog:
    dog.beat(1)
    ctypes.PyDLL(None).sleep(300)
"""
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60, check=False).returncode == 1
    assert time.monotonic() - began < 30
    assert "line 8" in (tmp_path / "stacks" / "rank-00000.txt").read_text()


def test_a_run_tells_its_history_and_status(data, tmp_path, capsys):
    folder, names = data
    out = tmp_path / "run"
    assert start([folder / "gpt.yaml", "--out", out, *names])[0] == 0
    assert events(out) == ["started", "saved", "saved", "finished"]
    assert not (out / "stacks").exists(), "nothing stalled"
    found = status(out)
    assert (found["state"], found["step"], found["steps"], found["starts"]) == ("finished", 8, 8, 1)
    assert found["seconds_left"] == 0 and found["per_second"]["sequences"] > 0 and found["faults"] == []
    assert found["newest_checkpoint"].endswith("step-0000008")
    assert main(["status", str(out)]) == 0
    said = capsys.readouterr().out
    assert "finished" in said and "step 8 of 8 (100.0%)" in said and "0:00:00 left" in said
    assert main(["status", str(out), "--json"]) == 0 and json.loads(capsys.readouterr().out)["state"] == "finished"
    assert main(["status", str(tmp_path)]) == 2 and "is not a training run" in capsys.readouterr().err


def test_states_of_a_run_that_is_killed_or_fails(data, tmp_path):
    folder, names = data
    out = tmp_path / "run"
    job = launch([folder / "gpt.yaml", "--out", out, *names, *LONG], 1)
    wait_for(lambda: logged(out) > 2 or job.poll() is not None, 120)
    found = status(out)
    assert found["state"] == "running" and 0 < found["step"] < 100_000 and found["seconds_left"] > 0
    job.kill()
    job.communicate()
    assert status(out, now=time.time() + 500)["state"] == "silent"
    code, output = start([folder / "gpt.yaml", "--out", out, *names, *LONG, "optimizer.lr=1e30"])
    assert code == 2 and "started with another recipe" in output
    broken = tmp_path / "broken"
    code, output = start([folder / "gpt.yaml", "--out", broken, *names, "checkpoint.keep_best=1",
                          "checkpoint.best_metric=beauty"])
    assert code == 2 and "which is not measured" in output
    found = status(broken)
    assert found["state"] == "failed" and "beauty, which is not measured" in found["faults"][0]["reason"]


def test_wrong_settings_are_refused(data):
    folder, names = data
    from gigatok_ds.errors import InputError

    with pytest.raises(InputError, match=r"monitor.stall_seconds is 0"):
        load_recipe(folder / "gpt.yaml", [*names, "monitor.stall_seconds=0"])
