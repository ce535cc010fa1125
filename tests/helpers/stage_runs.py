"""The stages of studies on forked ranks, which start at once."""

import subprocess
import sys
from types import SimpleNamespace

from rank_runs import run_main

from gigatok_ds.studies import stages


def fork_stages(monkeypatch):
    """What a study would start as processes of its own, or by torchrun, is forked."""
    monkeypatch.setattr(stages, "subprocess", SimpleNamespace(run=_run))


def _run(command, **_):
    ranks = int(command[command.index("--nproc-per-node") + 1]) if "--nproc-per-node" in command else 1
    code, said = run_main(command[command.index("gigatok_ds") + 1:], ranks)
    print(said, file=sys.stderr)
    return subprocess.CompletedProcess(command, code)
