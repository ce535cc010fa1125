"""Collectives outlast the watchdog, in every process group; and CUDA's queues are set up before CUDA is."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from rank_runs import run_ranks

from gigatok_ds.parallel.timeouts import MARGIN, NEVER, collective_timeout, outlast_watchdog
from gigatok_ds.resilience.watchdog import BACKSTOP_SECONDS, GATHER_SECONDS


def timeouts_of(stall):
    """Those of a run's groups: the first one's, one's that somebody else has made, and of both later."""
    from gigatok_ds.parallel.topology import start_process_group

    start_process_group(timeout=collective_timeout(stall))
    group = dist.new_group([0])

    def found():
        return [one._get_backend(torch.device("cpu")).options._timeout for one in (dist.group.WORLD, group)]

    before = found()
    outlast_watchdog(stall)
    return before, found()


@pytest.mark.parametrize("stall", [3600.0, None])
def test_every_process_group_outlasts_the_watchdog(stall):
    (before, after), = run_ranks(timeouts_of, 1, stall)
    expected = collective_timeout(stall)
    assert before[0] == expected and before[1] < expected, "torch gives others its own"
    assert after == [expected, expected]


def test_the_margin_covers_what_happens_after_a_stall():
    assert (
        collective_timeout(3600.0).total_seconds() == 3600 + MARGIN.total_seconds()
        and collective_timeout(None) == NEVER
    )
    assert MARGIN.total_seconds() > 2 * (BACKSTOP_SECONDS + GATHER_SECONDS)


def test_cudas_queues_are_ordered_before_anybody_asks_for_gpus():
    script = """
import os, sys
os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
import torch
asked = []
torch.cuda.is_available = torch.cuda.device_count = lambda: asked.append(1) or 0
from gigatok_ds.training import run_checks
def check_run(recipe, *_, **__):
    print(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"), asked, torch.cuda.is_initialized())
    sys.exit(0)
run_checks.check_run = check_run
from gigatok_ds.cli.main import main
main(["train", "GPT-B", "--out", "none", "--tp", sys.argv[1]])
"""
    said = [subprocess.run([sys.executable, "-c", script, size], capture_output=True, text=True, check=True,
                           timeout=120).stdout
            for size in ("1", "2")]
    assert said == ["None [] False\n", "1 [] False\n"]
