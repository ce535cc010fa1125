"""From what the hosts answered: a table, and one line for each problem that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from gigatok_ds.cluster.allreduce import STAGES, Progress
from gigatok_ds.cluster.host_facts import Facts
from gigatok_ds.cluster.hostfile import Host, Rendezvous

_VERSIONS = ("torch", "deepspeed", "megatron-core", "nccl", "driver", "python")
# Ranks work together across drivers and python's last digit; with another version of the rest they hang or disagree.
_MUST_AGREE = ("torch", "deepspeed", "megatron-core", "nccl", "python")
_NEEDED = ("torch", "deepspeed")
_SHOWN = 200  # characters of an error


@dataclass(frozen=True, kw_only=True)
class HostResult:
    """What is known of a host. facts is None when it did not answer; `failure` then says why."""

    host: Host
    facts: Facts | None = None
    failure: str | None = None
    answer_seen: bool | None = None  # the asking host sees the file that this host wrote; None: not asked
    allreduce: str = "not tried"

    @property
    def can_run_ranks(self) -> bool:
        facts = self.facts
        return facts is not None and not facts.device_error and (
            not facts.devices or self.host.slots <= len(facts.devices))


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the asking host has, for the others to agree with. None: not asked."""

    code: str
    recipe: str | None = None
    token: str | None = None
    shared: str | None = None  # the directory that the token was written below
    working_dir: str | None = None
    checkout: str = ""


def table(results: Sequence[HostResult]) -> str:
    """One row for each host."""
    rows = [("host", "slots", "devices", *_VERSIONS, "code", "recipe", "shared path", "all-reduce")]
    for result in results:
        facts = result.facts
        if facts is None:
            cells = ["no answer", *"-" * (len(rows[0]) - 4)]
        else:
            cells = [_devices(facts), *(facts.versions.get(name) or "-" for name in _VERSIONS),
                     (facts.code or "-")[:8], (facts.recipe or "-")[:8], _shared(facts, result.answer_seen)]
        rows.append((result.host.name, str(result.host.slots), *cells, result.allreduce))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def problems(results: Sequence[HostResult], expected: Expected) -> list[str]:
    """Everything about the hosts themselves that would make a job fail, hang or train something else."""
    answered = [(result, result.facts) for result in results if result.facts is not None]
    found = [f"{result.host.name}: {result.failure}" for result in results if result.facts is None]
    for result, facts in answered:
        found += [f"{result.host.name}: {text}" for text in _of_host(result, facts, expected)]
    kinds = _groups(answered, lambda facts: "GPU" if facts.devices else "CPU")
    if len(kinds) > 1:
        found.append(f"some hosts have no GPU: {_spelled(kinds)}; remove those from the hostfile, or mend their driver")
    for package in _MUST_AGREE:
        versions = _groups(answered, partial(_comparable, package=package))
        if len(versions) > 1 and not (package == "nccl" and len(kinds) > 1):
            found.append(f"{package} differs: {_spelled(versions)}; install the same version on every host")
    return found


def _of_host(result: HostResult, facts: Facts, expected: Expected) -> Iterable[str]:
    slots = result.host.slots
    if facts.device_error:
        yield f"torch does not find its devices ({facts.device_error}); reinstall torch or mend the driver"
    if facts.devices and slots > len(facts.devices):
        yield f"slots={slots}, but it has {len(facts.devices)} GPUs; correct its line in the hostfile"
    for package in _NEEDED:
        if not facts.versions.get(package):
            yield f"{package} is not installed for that python; pip install 'gigatok_ds[train]' there"
    if facts.code != expected.code:
        yield f"its files of gigatok_ds are not those of this machine; copy {expected.checkout} there"
    if facts.recipe_error:
        yield f"it cannot read the recipe ({facts.recipe_error}); copy the recipe file there"
    elif facts.recipe != expected.recipe:
        yield "it reads another recipe from the same name; copy the recipe and its bases there"
    if not facts.working_dir_exists:
        yield (f"there is no {expected.working_dir}, where ranks would start; launch from a directory that all hosts "
               "have")
    if facts.write_error:
        yield f"cannot write below {expected.shared} ({facts.write_error}); --out must be on a shared file system"
    elif facts.token != expected.token or result.answer_seen is False:
        yield f"{expected.shared} is not the same directory there; --out must be on a file system that all hosts share"


def allreduce_problems(hosts: Sequence[Host], progress: Sequence[Sequence[Progress]], failures: Sequence[str | None],
                       meeting: Rendezvous, backend: str) -> list[str]:
    """Which hosts kept the sum over ranks from happening, and what to do.

    progress: what the ranks of each host said; failures: how its command ended, when not well. Hosts that only
    waited for others are not named.
    """
    reached = [_stage(host, said) for host, said in zip(hosts, progress, strict=True)]
    if min(reached) == len(STAGES):
        return []
    last = [index for index, stage in enumerate(reached) if stage == min(reached)]
    names = ", ".join(hosts[index].name for index in last)
    errors = [item.error[:_SHOWN] for index in last for item in progress[index] if item.error]
    errors += [failure for index in last if (failure := failures[index])]
    reason = f" ({errors[0]})" if errors else ""
    where = f"{meeting.address}:{meeting.port}"
    interface = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    advice = (
        f"the ranks did not start{reason}; see whether the host has memory and processes left",
        f"ranks could not load torch and take their device{reason}; if it is only slow, give a longer --timeout",
        f"ranks did not reach {where}{reason}; every host must reach that address and port: set MASTER_ADDR and "
        "MASTER_PORT, or open the firewall",
        f"ranks met at {where}, but {backend} could not sum over them{reason}; name the interface that joins the "
        f"hosts: {interface}=... in .deepspeed_env",
    )
    return [f"{names}: all-reduce: {advice[min(reached)]}"]


def allreduce_cell(host: Host, said: Sequence[Progress]) -> str:
    """How far the ranks of a host came, for the table."""
    stage = _stage(host, said)
    return "ok" if stage == len(STAGES) else ("no ranks", "no device", "did not meet", "failed")[stage]


def _stage(host: Host, said: Sequence[Progress]) -> int:
    """How many of STAGES all ranks of the host passed."""
    return next((index for index, stage in enumerate(STAGES)
                 if len({item.rank for item in said if item.stage == stage}) < host.slots), len(STAGES))


def _groups(answered: Sequence[tuple[HostResult, Facts]], value: Callable[[Facts], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for result, facts in answered:
        groups.setdefault(value(facts), []).append(result.host.name)
    return groups


def _comparable(facts: Facts, package: str) -> str:
    version = facts.versions.get(package) or "none"
    return ".".join(version.split(".")[:2]) if package == "python" else version


def _spelled(groups: dict[str, list[str]]) -> str:
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in groups.items())


def _devices(facts: Facts) -> str:
    counts = {name: facts.devices.count(name) for name in facts.devices}
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "CPU"


def _shared(facts: Facts, answer_seen: bool | None) -> str:
    if answer_seen is None:
        return "-"
    return "ok" if answer_seen and facts.token and not facts.write_error else "no"
