"""Several pytest workers share the cores: each computes with its part of them, and so does what it starts."""

import os

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if workers > 1:  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
