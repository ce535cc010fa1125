"""One rank's failure ends all: four ranks in processes of their own, which fail in many ways."""

import os
import signal
import time

import pytest
from rank_runs import start_rank

from gigatok_ds.cluster.local_job import free_port

RANKS = 4


def run(body):
    """A rank's whole program, with `body` where training would be."""
    import torch.distributed as dist

    from gigatok_ds.errors import InputError
    from gigatok_ds.parallel.topology import start_process_group
    from gigatok_ds.resilience.rank_monitor import watch_ranks

    topology = start_process_group()
    with watch_ranks(topology):
        dist.barrier()
        print("ready", flush=True)
        exec(body, {"rank": topology.rank, "dist": dist, "time": time, "os": os,
                    "InputError": InputError})
    print("done", flush=True)


class Job:
    """Ranks that are forked, each with what it prints and its errors in files."""

    def __init__(self, body, folder):
        port = free_port()
        self.said = [(folder / f"rank-{rank}.out", folder / f"rank-{rank}.err") for rank in range(RANKS)]
        self.ranks = [start_rank(run, body, rank=rank, ranks=RANKS, port=port, output=said)
                      for rank, said in enumerate(self.said)]

    def wait_until_ready(self, seconds=60):
        deadline = time.monotonic() + seconds
        while not all(out.exists() and "ready" in out.read_text() for out, _ in self.said):
            assert time.monotonic() < deadline and all(process.is_alive() for process in self.ranks), self.errors()
            time.sleep(0.05)

    def errors(self):
        return "".join(error.read_text() for _, error in self.said if error.exists())

    def end(self, seconds=60):
        """(exit codes, everything on stderr) once all have ended by themselves."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(timeout=max(deadline - time.monotonic(), 0.1))
        assert not any(process.is_alive() for process in self.ranks), self.errors()
        return [process.exitcode for process in self.ranks], self.errors()


@pytest.fixture
def job(tmp_path):
    started = []

    def start(body):
        started.append(Job(body, tmp_path))
        return started[-1]

    yield start
    for process in (process for one in started for process in one.ranks):
        process.kill()
        process.join()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("body", ["time.sleep(600)", "dist.barrier() if rank != {} else time.sleep(600)"])
def test_a_killed_rank_is_named_and_ends_all(job, rank, body):
    ranks = job(body.format(rank))
    ranks.wait_until_ready()
    os.kill(ranks.ranks[rank].pid, signal.SIGKILL)
    codes, errors = ranks.end()
    assert codes[rank] == -signal.SIGKILL and all(codes)
    assert errors.count("died without a message") == 1 and "Traceback" not in errors
    assert f"rank {rank} (host " in errors and f"pid {ranks.ranks[rank].pid}" in errors


@pytest.mark.parametrize("rank", [0, 1])
def test_a_traceback_is_shown_once_although_others_hang(job, rank):
    codes, errors = job(f"if rank == {rank}: raise KeyError('oh no')\ntime.sleep(600)").end()
    assert codes == [1] * RANKS
    assert errors.count("Traceback") == errors.count("KeyError: 'oh no'") == 1
    assert errors.count("failed:") == 1 and f"rank {rank} (host " in errors


def test_what_follows_from_a_failure_is_not_shown(job):
    """The others' barrier fails a moment later, as connections close."""
    codes, errors = job("if rank == 3: os._exit(7)\ndist.barrier()").end()
    assert all(codes) and codes[3] == 7
    assert "rank 3 (host" in errors and "Traceback" not in errors


def test_what_is_wrong_for_all_is_one_line(job):
    codes, errors = job("raise InputError('data.train is\\nmissing')").end()
    assert codes == [2] * RANKS
    assert errors.split("\n") == ["", "gigatok-ds train: error: data.train is missing", ""]


def test_ranks_may_end_at_different_times(job):
    codes, errors = job("time.sleep(0.5 * ((rank + 2) % 4))").end()
    assert codes == [0] * RANKS and errors == ""


def test_a_failure_after_others_have_left_is_still_told(job):
    codes, errors = job("if rank == 1:\n    time.sleep(1)\n    raise ValueError('late')").end()
    assert codes[0] == codes[1] == 1 and errors.count("ValueError: late") == 1
