"""The machines of a plan: hosts of equal GPUs."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from gigatok_ds.errors import InputError
from gigatok_ds.planning.devices import DEVICES, GB, Device, this_cpu


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`hosts` hosts of `per_host` GPUs each."""

    hosts: int
    per_host: int
    device: Device

    @property
    def ranks(self) -> int:
        return self.hosts * self.per_host

    def __str__(self) -> str:
        return f"{self.hosts}x{self.per_host}x{self.device.name}"


_FORM = re.compile(r"(?:(\d+)x)?(\d+)x([A-Za-z].*)")


def parse_cluster(text: str, *, memory_gb: float | None = None, network_gbps: float | None = None,
                  described: Device | None = None) -> Cluster:
    """HOSTSxGPUSxDEVICE, such as 8x8xH100, or GPUSxDEVICE of a single host.

    memory_gb (10^9 bytes) and network_gbps (10^9 bits per second and GPU) replace what the data sheet says; `described`
    is known by its name, too. Raises InputError.
    """
    match = _FORM.fullmatch(text.strip())
    if not match:
        raise InputError(f"--cluster is {text!r}; write HOSTSxGPUSxDEVICE, such as 8x8xH100, with one of "
                         f"{', '.join(DEVICES)}")
    hosts, per_host, name = int(match[1] or 1), int(match[2]), match[3]
    known = DEVICES | {"CPU": this_cpu(per_host or 1)} | ({described.name: described} if described else {})
    if name not in known:
        raise InputError(f"--cluster is {text!r}, but {name!r} is not known; known are {', '.join(known)}, and what "
                         "--gpu-spec describes")
    if not (hosts and per_host):
        raise InputError(f"--cluster is {text!r}; it needs at least one host and one GPU")
    device = known[name]
    for what, value in (("--memory-gb", memory_gb), ("--network-gbps", network_gbps)):
        if value is not None and not value > 0:
            raise InputError(f"{what} is {value}; it must be above 0")
    if memory_gb is not None:
        device = replace(device, memory=int(memory_gb * GB))
    if network_gbps is not None:
        device = replace(device, network=network_gbps * GB / 8)
    return Cluster(hosts=hosts, per_host=per_host, device=device)
