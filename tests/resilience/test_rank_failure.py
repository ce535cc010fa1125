"""A job of four ranks through the launcher, one of which is killed: all end soon, and the log says which it was."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from rank_processes import ranks_below, wait_for
from training_runs import launch, prepare


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_killing_one_rank_of_four_ends_the_job_and_names_it(tmp_path):
    data = prepare(tmp_path)
    job = launch([tmp_path / "gpt.yaml", "--out", tmp_path / "run", "--zero", 3, *data["gpt"],
                  "training.steps=100000", "training.validate_every=100000", "checkpoint.every=100000"], ranks=4)
    ranks = {}
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: job.poll() is not None or (metrics.is_file() and metrics.read_text().count("\n") > 3), 200)
        ranks = ranks_below(job.pid)
        assert sorted(ranks) == [0, 1, 2, 3], job.communicate(timeout=10)[0]
        killed = time.monotonic()
        os.kill(ranks[2], signal.SIGKILL)
        output, _ = job.communicate(timeout=60)
        assert time.monotonic() - killed < 60 and job.returncode != 0
        naming = [line for line in output.splitlines() if line.startswith("rank 2 (") and "died" in line]
        assert len(naming) == 1 and f"pid {ranks[2]}" in naming[0], output[-3000:]
        assert "Traceback" not in output
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()), 20)
    finally:
        for pid in [job.pid, *ranks.values()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.wait()
