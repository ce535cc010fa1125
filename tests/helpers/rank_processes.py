"""The processes of a job that a launcher has started."""

import contextlib
import time
from pathlib import Path


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
