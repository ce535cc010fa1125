"""Ask every host of a job, all at once and with a limit on the time, what would otherwise show as a hang."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gigatok_ds.cluster import allreduce, host_facts
from gigatok_ds.cluster.cluster_report import (
    Expected,
    HostResult,
    allreduce_cell,
    allreduce_problems,
    problems,
    table,
)
from gigatok_ds.cluster.hostfile import Host, Rendezvous, read_hostfile, rendezvous
from gigatok_ds.cluster.remote_shell import CHECKOUT, Outcome, Reach
from gigatok_ds.cluster.ssh_environment import rank_variables
from gigatok_ds.config.load import recipe_names
from gigatok_ds.errors import InputError

HERE = "this machine"
_CPU_RANKS = 2  # of a machine without GPUs, when no hostfile says how many


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to check. Without a hostfile: this machine, without ssh."""

    hostfile: Path | None = None
    out: Path | None = None
    recipe: str | None = None
    seconds: int = 120
    with_allreduce: bool = True


@dataclass(frozen=True, kw_only=True)
class HostVerdict:
    """The table, and one line for each problem."""

    table: str
    problems: list[str]


def check_cluster(request: Request, environment: Mapping[str, str]) -> HostVerdict:
    """Check the hosts of a hostfile, or this machine.

    Raises InputError for a request that cannot be asked: no such hostfile, recipe or directory. Leaves nothing behind:
    files are removed, and processes are ended by `timeout` on their own host.
    """
    if request.seconds < 1:
        raise InputError(f"--timeout is {request.seconds}; at least 1 second is needed")
    hosts = read_hostfile(request.hostfile, environment) if request.hostfile else [Host(name=HERE, slots=1)]
    if request.hostfile and shutil.which("ssh") is None:
        raise InputError("there is no ssh on PATH; the hosts of a hostfile are reached by it")
    working_dir = Path.cwd()
    variables = rank_variables(environment, Path.home(), working_dir) if request.hostfile else {}
    reach = Reach(ssh=request.hostfile is not None, variables=variables)
    recipe = _named_everywhere(request.recipe)
    expected = Expected(code=host_facts.source_hash(host_facts.PACKAGE),
                        recipe=host_facts.recipe_hash(recipe) if recipe else None,
                        working_dir=str(working_dir), checkout=str(CHECKOUT))
    with _shared_folder(request.out) as folder:
        if folder:
            expected = replace(expected, token=(folder / "token").read_text(), shared=str(folder.parent))
        results = probe_hosts(hosts, reach, recipe, folder, str(working_dir), request.seconds)
    if not request.hostfile and results[0].facts:
        slots = len(results[0].facts.devices) or _CPU_RANKS
        results = [replace(results[0], host=Host(name=HERE, slots=slots))]
    found = problems(results, expected)
    if len(hosts) > 1 and shutil.which("pdsh") is None:
        found.append("pdsh is not installed on this machine, and launch/train.sh needs it; install it (Debian: apt-get "
                     "install pdsh), or use launch/torchrun.sh")
    if request.with_allreduce and all(result.can_run_ranks for result in results):
        results, failed = _allreduce(results, reach, rendezvous(hosts if request.hostfile else [], environment),
                                     request.seconds)
        found += failed
    return HostVerdict(table=table(results), problems=found)


def _named_everywhere(recipe: str | None) -> str | None:
    """A recipe as every host can find it: by name, or by absolute path."""
    return recipe if recipe is None or recipe in recipe_names() else os.path.abspath(recipe)


@contextmanager
def _shared_folder(out: Path | None) -> Iterator[Path | None]:
    """A folder with a token file, below `out` or the nearest directory above it that exists; removed afterwards."""
    if out is None:
        yield None
        return
    out = out.absolute()
    below = next(path for path in (out, *out.parents) if path.exists())
    if not below.is_dir():
        raise InputError(f"{below} is not a directory; choose another --out")
    folder = Path(tempfile.mkdtemp(prefix=".check-cluster-", dir=below))
    try:
        (folder / "token").write_text(secrets.token_hex(16))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def probe_hosts(hosts: Sequence[Host], reach: Reach, recipe: str | None, folder: Path | None, working_dir: str,
                seconds: int) -> list[HostResult]:
    """What each host tells of itself, or why it does not; with a folder that all should share, they answer there, too.
    """
    answers = [folder / f"host-{index}" if folder else None for index in range(len(hosts))]
    questions = [host_facts.Question(recipe=recipe, token=str(folder / "token") if folder else None,
                                answer=str(answer) if answer else None, working_dir=working_dir)
                 for answer in answers]
    outcomes = reach.run(hosts, host_facts.__name__, [[json.dumps(asdict(question))] for question in questions],
                         seconds)
    results = []
    for host, outcome, answer in zip(hosts, outcomes, answers, strict=True):
        lines = outcome.marked(host_facts.MARK)
        if lines:
            seen = answer.is_file() if answer else None
            results.append(HostResult(host=host, facts=host_facts.Facts(**json.loads(lines[-1])), answer_seen=seen))
        else:
            results.append(HostResult(host=host, failure=_why(host, outcome, seconds)))
    return results


def _why(host: Host, outcome: Outcome, seconds: int) -> str:
    """Why a host gave no answer, and what to do."""
    if outcome.unreachable:
        return f"ssh does not reach it ({outcome.last_words}); `ssh {host.name} true` must work without a password"
    if outcome.timed_out:
        return f"no answer within {seconds} s; look at its load and file systems, or give a longer --timeout"
    return (f"the check did not run there ({outcome.last_words}); the same python and checkout must be there under the "
            "same paths")


def _allreduce(results: Sequence[HostResult], reach: Reach, meeting: Rendezvous,
               seconds: int) -> tuple[list[HostResult], list[str]]:
    hosts = [result.host for result in results]
    world_size = sum(host.slots for host in hosts)
    jobs, first = [], 0
    for host in hosts:
        jobs.append(allreduce.AllReduceJob(address=meeting.address, port=meeting.port, world_size=world_size,
                                  ranks=list(range(first, first + host.slots)), seconds=seconds))
        first += host.slots
    outcomes = reach.run(hosts, allreduce.__name__, [[json.dumps(asdict(job))] for job in jobs], seconds)
    said = [[allreduce.Progress(**json.loads(line)) for line in outcome.marked(allreduce.MARK)] for outcome in outcomes]
    failures = [f"no answer within {seconds} s" if outcome.timed_out else outcome.last_words if outcome.code else None
                for outcome in outcomes]
    backend = "nccl" if all(result.facts and result.facts.devices for result in results) else "gloo"
    found = allreduce_problems(hosts, said, failures, meeting, backend)
    return [replace(result, allreduce=allreduce_cell(result.host, lines))
            for result, lines in zip(results, said, strict=True)], found
