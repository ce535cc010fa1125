"""Start `gigatok-ds train` on every rank by DeepSpeed's launcher; launch/train.sh is its front door (cli/launcher.py).

Reads HOSTFILE, GPUS, MASTER_ADDR, MASTER_PORT and FORCE_SSH from the environment, as launch/train.sh --help explains.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gigatok_ds.cluster.hostfile import positive, read_hostfile, rendezvous
from gigatok_ds.cluster.restarts import newest_checkpoint, run_with_restarts
from gigatok_ds.cluster.ssh_environment import ENV_FILE_VARIABLE, escaped, for_deepspeed, for_pdsh, rank_variables
from gigatok_ds.errors import InputError

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[2]
MODULE = ("--module", "gigatok_ds", "train")
_BARE = re.compile(r"[\w@+=:,./-]+")  # what DeepSpeed may pass to a remote shell without quotes


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What will be run here, and the env file of the ranks on other hosts (None: all ranks start here)."""

    command: list[str]
    env_file: str | None
    note: str | None = None


def plan(arguments: Sequence[str], environment: Mapping[str, str], *, home: Path, working_dir: Path) -> Launch:
    """How to start `gigatok-ds train ARGUMENTS` on the ranks that the environment describes.

    Raises InputError when DeepSpeed is not installed, or for a value that it would misunderstand.
    """
    hostfile = environment.get("HOSTFILE")
    hosts = read_hostfile(hostfile, environment) if hostfile else []
    remote = len(hosts) > 1 or bool(hosts and environment.get("FORCE_SSH", "0") not in ("", "0"))
    meeting = rendezvous(hosts, environment)
    command = [_deepspeed(), "--no_local_rank", "--master_port", str(meeting.port)]
    if hostfile and hosts:
        command += ["--hostfile", hostfile, "--master_addr", meeting.address if remote else "127.0.0.1"]
    if ranks := positive(environment, "GPUS"):
        command += ["--num_gpus", str(ranks)]
    if not remote:
        note = None
        if hosts:
            command.append("--no_ssh_check")
            note = f"one host in {hostfile}: starting on this machine; FORCE_SSH=1 reaches {hosts[0].name} by ssh"
        return Launch(command=[*command, *MODULE, *arguments], env_file=None, note=note)
    for what, path in (("working directory", str(working_dir)), ("python", sys.executable)):
        if not _BARE.fullmatch(path):
            raise InputError(f"the {what} is {path!r}; DeepSpeed can start a job on other hosts only from a path "
                             "without spaces and shell characters")
    variables = rank_variables(environment, home, working_dir)
    search = variables.get("PYTHONPATH", "")
    if str(CHECKOUT) not in search.split(":"):  # the user's file may say where else to look, but not hide this package
        variables["PYTHONPATH"] = ":".join(filter(None, [escaped(str(CHECKOUT)), search]))
    env_file = "".join(f"{name}={for_pdsh(value)}\n" for name, value in variables.items())
    if len(hosts) == 1:
        command.append("--force_multi")
    return Launch(command=[*command, *MODULE, *map(for_deepspeed, arguments)], env_file=env_file)


def _deepspeed() -> str:
    """The `deepspeed` command of this python: another one would start ranks of another environment."""
    folders = [sysconfig.get_path("scripts"), sysconfig.get_path("scripts", f"{os.name}_user")]
    found = shutil.which("deepspeed", path=os.pathsep.join(folders))
    if found is None:
        raise InputError(f"{sys.executable} has no deepspeed; pip install 'gigatok_ds[train]' there, or put the "
                         "python that has it first on PATH")
    return found


def described(launch: Launch, environment: Mapping[str, str]) -> str:
    """What --dry-run prints: comments, and the statements that would be run."""
    lines = []
    if launch.env_file is not None:
        lines += ["# every rank on every host is also given, by a temporary DS_ENV_FILE:"]
        lines += [f"#   {line}" for line in launch.env_file.splitlines()]
    lines += [f"export {name}={shlex.quote(environment[name])}"
              for name in ("PYTHONPATH", "OMP_NUM_THREADS", "DS_ACCELERATOR") if environment.get(name)]
    return "\n".join([*lines, shlex.join(launch.command)])


@dataclass(frozen=True, kw_only=True)
class Options:
    """train.sh's own options, which come before those of gigatok-ds train."""

    dry_run: bool = False
    max_restarts: int = 0
    min_hosts: int | None = None  # None: all that the hostfile names

    @classmethod
    def taken_from(cls, argv: Sequence[str]) -> tuple[Options, list[str]]:
        """The options, and the arguments that follow them."""
        found: dict = {}
        rest = list(argv)
        while rest and rest[0] in ("--dry-run", "--max-restarts", "--min-hosts"):
            name = rest.pop(0)[2:].replace("-", "_")
            found[name] = True if name == "dry_run" else positive({name: rest.pop(0) if rest else "nothing"}, name)
        options = cls(**found)
        if options.min_hosts and not options.max_restarts:
            raise InputError("--min-hosts is for restarts, of which there are none; give --max-restarts, too")
        return options, rest


def start(launch: Launch, options: Options, arguments: Sequence[str], environment: Mapping[str, str],
          run_dir: Path | None = None) -> int:
    """Become DeepSpeed's launcher or, with restarts, start it as often as is needed and return its exit code.

    run_dir is where the job's checkpoints tell that it makes progress; for restarts only.
    """
    sys.stdout.flush()
    if not options.max_restarts:
        command, variables, _ = _ready(launch, environment)
        os.execve(command[0], command, variables)

    def again(restarts: int) -> subprocess.Popen | None:
        planned = launch
        inherited: tuple[int, ...] = ()
        if restarts and launch.env_file is not None:
            from gigatok_ds.cluster.preflight import usable_hosts

            hosts = usable_hosts(environment["HOSTFILE"], environment)
            needed = options.min_hosts or len(read_hostfile(environment["HOSTFILE"], environment))
            if len(hosts) < needed:
                logger.info("%d hosts can take part, and %d must (--min-hosts)", len(hosts), needed)
                return None
            memory = _in_memory("hostfile", "".join(f"{host.name} slots={host.slots}\n" for host in hosts))
            smaller = {**environment, "HOSTFILE": f"/proc/self/fd/{memory}", "FORCE_SSH": "1"}
            planned, inherited = plan(arguments, smaller, home=Path.home(), working_dir=Path.cwd()), (memory,)
        command, variables, descriptors = _ready(planned, environment)
        try:
            return subprocess.Popen(command, env=variables, pass_fds=(*descriptors, *inherited))
        finally:
            for descriptor in (*descriptors, *inherited):
                os.close(descriptor)

    return run_with_restarts(again, options.max_restarts, lambda: newest_checkpoint(run_dir) if run_dir else None)


def _ready(launch: Launch, environment: Mapping[str, str]) -> tuple[list[str], dict[str, str], tuple[int, ...]]:
    """Command, environment and descriptors to inherit. The env file is one in memory: nothing is left behind."""
    if launch.env_file is None:
        return launch.command, dict(environment), ()
    if shutil.which("pdsh") is None:
        raise InputError("pdsh is not installed on this machine, and DeepSpeed starts other hosts with it; install "
                         "it (Debian: apt-get install pdsh) or use launch/torchrun.sh on every host")
    memory = _in_memory("deepspeed_env", launch.env_file)
    return launch.command, {**environment, ENV_FILE_VARIABLE: f"/proc/self/fd/{memory}"}, (memory,)


def _in_memory(name: str, text: str) -> int:
    """A descriptor, which child processes may inherit, of a file that no disk holds."""
    memory = os.memfd_create(name, 0)
    os.write(memory, text.encode())
    os.set_inheritable(memory, True)
    return memory
