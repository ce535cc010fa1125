"""The hosts of a job, in the form that DeepSpeed's launcher reads: `worker-1 slots=8`, one host a line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gigatok_ds.errors import InputError

# DeepSpeed ignores whatever follows the digits, and would start fewer ranks than a line means.
_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,6})(\s+max_slots=[0-9]+)?(\s+#.*)?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
DEFAULT_PORT = 29500


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host as ssh reaches it, and how many ranks it runs."""

    name: str
    slots: int


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where the ranks meet: rank 0 listens there."""

    address: str
    port: int


def read_hostfile(path: str | Path, environment: Mapping[str, str]) -> list[Host]:
    """The hosts of a hostfile, in rank order. GPUS in the environment replaces their slots, as in launch/train.sh.

    Raises InputError, with the number of the line, for what DeepSpeed would refuse or misunderstand.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # as DeepSpeed counts lines
    except FileNotFoundError:
        raise InputError(f"there is no hostfile {path}; see launch/hostfile.example") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file; see launch/hostfile.example") from None
    if lines[0].startswith("\ufeff"):
        raise InputError(f"{path} line 1: it begins with a byte-order mark, which would become part of the host's "
                         "name; save the file as UTF-8 without one")
    hosts: dict[str, Host] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        where, match = f"{path} line {number}", _LINE.fullmatch(line)
        if "[" in line.split("slots=")[0] or "{" in line.split("slots=")[0]:
            raise InputError(f"{where}: {line!r} stands for several hosts; give each host a line of its own")
        if not match:
            raise InputError(f"{where}: {line!r} is not of the form HOST slots=N; give each host a line of its own")
        name, slots = match[1], int(match[2])
        if not _NAME.fullmatch(name):
            raise InputError(f"{where}: {name!r} is not a host name; give user and port in ~/.ssh/config")
        if slots < 1:
            raise InputError(f"{where}: {name} has slots={slots}; at least 1 is needed, or remove the line")
        if name in hosts:
            raise InputError(f"{where}: {name} appears twice; add up its slots on one line")
        hosts[name] = Host(name=name, slots=slots)
    if not hosts:
        raise InputError(f"{path} names no host; a line looks like: worker-1 slots=8")
    ranks = positive(environment, "GPUS")
    return [replace(host, slots=ranks or host.slots) for host in hosts.values()]


def rendezvous(hosts: list[Host], environment: Mapping[str, str]) -> Rendezvous:
    """MASTER_ADDR and MASTER_PORT of the environment; else the first host (this one), and DeepSpeed's default port."""
    port = positive(environment, "MASTER_PORT") or DEFAULT_PORT
    if port > 65535:
        raise InputError(f"MASTER_PORT is {port}; a TCP port is at most 65535")
    return Rendezvous(address=environment.get("MASTER_ADDR") or (hosts[0].name if hosts else "127.0.0.1"), port=port)


def positive(environment: Mapping[str, str], name: str) -> int | None:
    """A whole number of at least 1 from an environment variable; None when it is empty or not set."""
    text = environment.get(name, "")
    if not text:
        return None
    if not re.fullmatch(r"0*[1-9][0-9]*", text):
        raise InputError(f"{name} is {text!r}; a whole number of at least 1 is expected")
    return int(text)
