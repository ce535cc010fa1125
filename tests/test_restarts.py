"""Jobs that end by a fault are started again while they make progress; what starting again would not mend is final."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from test_rank_failure import ranks_below, wait_for
from training_runs import launch, prepare

from gigatok_ds.checkpoint.run_directory import complete_checkpoints
from gigatok_ds.cluster.restarts import newest_checkpoint, run_with_restarts
from gigatok_ds.training.history import read_history
from gigatok_ds.training.stop_requests import REQUEUE


def tries(codes, most, reached=None):
    """(exit code, waits, how many were started) of a job that ends with each of `codes` in turn."""
    waits, started, progress = [], [], iter(reached or [0] * 100)

    def start():
        started.append(1)
        return subprocess.Popen([sys.executable, "-c", f"import os; os._exit({codes[len(started) - 1]})"])

    return run_with_restarts(start, most, lambda: next(progress), sleep=waits.append), waits, len(started)


@pytest.mark.parametrize("code", [0, 2, REQUEUE])
def test_final_codes_end_the_tries(code):
    assert tries([code], 5) == (code, [], 1)


def test_a_fault_is_tried_again_after_growing_waits():
    assert tries([1, 1, 1, 0], 5) == (0, [5, 10, 20], 4)
    assert tries([1] * 10, 8)[1] == [5, 10, 20, 40, 80, 160, 300, 300]


def test_tries_in_a_row_are_bounded(capsys):
    assert tries([1, 1, 3, 0], 2) == (3, [5, 10], 3)
    assert "2 restarts in a row without a new checkpoint; giving up" in capsys.readouterr().err


def test_progress_begins_the_count_anew():
    """progress is asked before and after each try."""
    assert tries([1, 1, 1, 1, 0], 1, [0, 1, 1, 2, 2, 3, 3, 4, 4, 4]) == (0, [5, 5, 5, 5], 5)


def test_a_killed_job_has_the_code_of_a_shell():
    def start():
        return subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])

    assert run_with_restarts(start, 0, lambda: 0) == 128 + 9


def test_signals_reach_the_job_and_end_the_tries():
    def start():
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    began = time.monotonic()
    assert run_with_restarts(start, 5, lambda: 0) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 20


def test_the_newest_checkpoint_is_found_by_the_arguments(tmp_path):
    assert newest_checkpoint(["GPT-B", "--out", str(tmp_path)]) is None and newest_checkpoint(["GPT-B"]) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-0000004\n")
    assert newest_checkpoint(["GPT-B", "--out", str(tmp_path), "a=b"]) == "step-0000004"


def test_a_rank_that_is_killed_costs_a_restart_only(tmp_path, monkeypatch):
    """Two ranks through launch/train.sh; the run ends by itself, from its last checkpoint on."""
    monkeypatch.setenv("MAX_RESTARTS", "2")
    names = prepare(tmp_path)["gpt"]
    out = tmp_path / "run"
    steps = ["training.steps=400", "checkpoint.every=20", "checkpoint.keep=2", "training.validate_every=400"]
    job = launch([tmp_path / "gpt.yaml", "--out", out, *names, *steps], 2)
    try:
        wait_for(lambda: complete_checkpoints(out) or job.poll() is not None, 200)
        os.kill(ranks_below(job.pid)[1], signal.SIGKILL)
        output, _ = job.communicate(timeout=200)
    finally:
        job.kill()
    assert job.returncode == 0, output[-3000:]
    assert "restart 1 of 2 in 5 s" in output and "resuming from" in output
    told = [line["event"] for line in read_history(out) if line["event"] != "saved"]
    assert told == ["started", "failed", "started", "finished"]
    assert complete_checkpoints(out)[-1][0] == 400
