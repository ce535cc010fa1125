"""A job of four ranks through the launcher, one of which is killed: all end soon, and the log says which it was."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from training_runs import launch, prepare


def ranks_below(pid):
    """{rank: pid} of the training processes that descend from `pid`."""
    found, parents = {}, {pid}
    processes = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (entry / "environ").read_bytes().split(b"\0")
            ranks = [int(line[5:]) for line in environment if line.startswith(b"RANK=")]
            processes.append((int(entry.name), parent, ranks))
    for process, parent, ranks in sorted(processes):
        if parent in parents:
            parents.add(process)
            if ranks:
                found.setdefault(ranks[0], process)
    return found


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.2)


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
