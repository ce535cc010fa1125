"""The machine that a benchmark runs on, as its report names it."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_gb() -> float | None:
    """In 10^9 bytes; None where the system does not say."""
    return next((int(line.split()[1]) * 1024 / 1e9 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")),
                None)


def gpus() -> list[str]:
    """Names of the GPUs that torch can use."""
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def slug(gpu_names: list[str]) -> str:
    """The machine in a file's name: processor, cores, and GPUs if it has any."""
    words = re.sub(r"\([^)]*\)|@.*", "", processor()).split()
    words += [f"{cores()}-cores", *([f"{len(gpu_names)}x", gpu_names[0]] if gpu_names else [])]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
