"""Several ranks on this machine: where they meet, and how they share its cores."""

from __future__ import annotations

import os
import socket


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def rank_environment(ranks: int) -> dict[str, str]:
    """The environment for `ranks` processes on this machine: they share its cores unless the user decided."""
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    return {"OMP_NUM_THREADS": threads} | os.environ
