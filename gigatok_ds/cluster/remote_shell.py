"""Run one bounded command on every host at once."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from gigatok_ds.cluster.hostfile import Host
from gigatok_ds.cluster.ssh_environment import export_statements

CHECKOUT = Path(__file__).resolve().parents[2]
CONNECT_SECONDS = 10
_GRACE = 5  # after its time, a command is asked to end, and after these seconds it is killed
_TIMED_OUT = (124, 137)
_SSH_FAILED = 255


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command on a host ended."""

    stdout: str
    stderr: str
    code: int
    timed_out: bool

    @property
    def unreachable(self) -> bool:
        return self.code == _SSH_FAILED

    @property
    def last_words(self) -> str:
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"

    def marked(self, mark: str) -> list[str]:
        """What follows `mark` on the lines of standard output that begin with it."""
        return [line.removeprefix(mark) for line in self.stdout.splitlines() if line.startswith(mark)]


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How a python module is started on a host: over ssh, with the variables that ranks are given, or here."""

    ssh: bool
    variables: dict[str, str]  # as ssh_environment.rank_variables gives them

    def command(self, host: Host, module: str, arguments: Sequence[str], seconds: int) -> list[str]:
        """The command that runs `python -m module arguments` on `host` for at most `seconds`.

        The python and the checkout are those of this process. `timeout` on the host itself ends the module and
        all that it started, also when the connection is lost.
        """
        bounded = ["timeout", "-k", str(_GRACE), str(seconds), sys.executable, "-u", "-m", module, *arguments]
        if not self.ssh:
            return bounded
        script = export_statements(self.variables) + _export_path() + "exec " + shlex.join(bounded)
        return ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", host.name, script]

    def run(self, hosts: Sequence[Host], module: str, arguments: Sequence[Sequence[str]],
            seconds: int) -> list[Outcome]:
        """Run the module on all hosts at once, each with its own arguments; outcomes in the order of `hosts`."""
        commands = [self.command(host, module, words, seconds) for host, words in zip(hosts, arguments, strict=True)]
        return _run_all(commands, seconds + CONNECT_SECONDS + 2 * _GRACE)


def _export_path() -> str:
    return f'export PYTHONPATH={shlex.quote(str(CHECKOUT))}"${{PYTHONPATH:+:$PYTHONPATH}}"; '


def _run_all(commands: Sequence[Sequence[str]], seconds: float) -> list[Outcome]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(
        [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        running = []
        for command in commands:
            # Files, not pipes: nobody needs to read them for the command to go on.
            stdout, stderr = (stack.enter_context(TemporaryFile()) for _ in range(2))
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                                       env=environment)
            stack.callback(_end, process)
            running.append((process, stdout, stderr))
        return [_outcome(*one, deadline) for one in running]


def _outcome(process: subprocess.Popen, stdout: IO[bytes], stderr: IO[bytes], deadline: float) -> Outcome:
    try:
        code = process.wait(timeout=max(0.0, deadline - time.monotonic()))
        timed_out = code in _TIMED_OUT
    except subprocess.TimeoutExpired:
        _end(process)
        code, timed_out = process.returncode, True
    texts = []
    for file in (stdout, stderr):
        file.seek(0)
        texts.append(file.read().decode(errors="replace"))
    return Outcome(stdout=texts[0], stderr=texts[1], code=code, timed_out=timed_out)


def _end(process: subprocess.Popen) -> None:
    """End what is still running. `timeout` hands the signal on to what it started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=2 * _GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
