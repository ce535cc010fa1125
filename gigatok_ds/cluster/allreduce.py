"""One sum over all ranks of the job, by NCCL on GPUs and gloo on CPUs, saying how far each rank came.

    python -m gigatok_ds.cluster.allreduce '{"address": ..., "port": ..., "world_size": 4, "ranks": [2, 3], ...}'

This starts the ranks of one host and waits for them. With "ranks": [R] and "local_rank" it is a rank itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

MARK = "gigatok-ds-rank "
# The process runs; it has its device; rank 0 answers at the address; the sum is right.
STAGES = ("started", "ready", "met", "reduced")
_ELEMENTS = 2**22  # 16 MiB: large enough for the transport that gradients take
_SHORTEST = 5.0


@dataclass(frozen=True, kw_only=True)
class AllReduceJob:
    """The ranks that one process takes care of, and where all of them meet."""

    address: str
    port: int
    world_size: int
    ranks: list[int]
    seconds: float
    local_rank: int | None = None  # None: start these ranks


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A line that a rank prints: the stage that it reached, or why it stopped."""

    rank: int
    stage: str | None = None
    error: str | None = None


def run_host(job: AllReduceJob) -> int:
    """Start this host's ranks; 0 when all of them succeed. Being run by `timeout`, they end with this process."""
    alone = [replace(job, ranks=[rank], local_rank=local) for local, rank in enumerate(job.ranks)]
    command = [sys.executable, "-u", "-m", __spec__.name]
    processes = [subprocess.Popen([*command, json.dumps(asdict(one))]) for one in alone]
    return int(any(process.wait() for process in processes))


def run_rank(job: AllReduceJob) -> int:
    rank, deadline = job.ranks[0], time.monotonic() + job.seconds
    _say(Progress(rank=rank, stage="started"))
    try:
        _reduce(job, rank, deadline)
    except Exception as error:  # whatever a backend raises is the answer to the question
        _say(Progress(rank=rank, error=" ".join(str(error).split())))
        return 1
    _say(Progress(rank=rank, stage="reduced"))
    return 0


def _reduce(job: AllReduceJob, rank: int, deadline: float) -> None:
    import torch
    import torch.distributed as dist

    assert job.local_rank is not None, "not the job of a rank"
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", job.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    _say(Progress(rank=rank, stage="ready"))
    left = timedelta(seconds=max(_SHORTEST, deadline - time.monotonic()))
    store = dist.TCPStore(job.address, job.port, job.world_size, rank == 0, timeout=left, wait_for_workers=False)
    _say(Progress(rank=rank, stage="met"))
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=job.world_size,
                            timeout=left)
    total = torch.full((_ELEMENTS,), float(rank + 1), device=device)
    dist.all_reduce(total)
    expected = job.world_size * (job.world_size + 1) / 2
    if not bool((total == expected).all()):
        raise RuntimeError(f"the sum over ranks is {total.min().item()} to {total.max().item()}, not {expected}")
    dist.barrier()  # rank 0 keeps the store; it must not go before the others are done
    dist.destroy_process_group()


def _say(progress: Progress) -> None:
    """One write for one line: the ranks of a host share its standard output."""
    os.write(sys.stdout.fileno(), f"{MARK}{json.dumps(asdict(progress))}\n".encode())


if __name__ == "__main__":
    job = AllReduceJob(**json.loads(sys.argv[1]))
    sys.exit(run_host(job) if job.local_rank is None else run_rank(job))
