"""The sections in the order of their value, each with its share of the time and what it needs."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TRAINING = ("deepspeed", "megatron", "scipy", "tensorboard")
FROZEN = ("timm", "torchvision")


@dataclass(frozen=True, kw_only=True)
class Section:
    """share: seconds of eight minutes. packages, programs: without which there is nothing to run."""

    module: str
    what: str
    share: float
    packages: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()

    def missing(self, path: list[str], programs_path: str) -> str | None:
        """What it lacks, given where packages and programs are looked for; None when nothing."""
        absent = [package for package in self.packages if not _importable(package, path)]
        if absent:
            return f"needs {', '.join(absent)}: --wheels DIR, made by benchmarks/bundle_wheels.sh"
        absent = [program for program in self.programs if not shutil.which(program, path=programs_path)]
        return f"needs {', '.join(absent)}, which is not on the PATH" if absent else None


def _importable(package: str, path: list[str]) -> bool:
    return any((Path(folder) / package).is_dir() for folder in path) or importlib.util.find_spec(package) is not None


SECTIONS: Mapping[str, Section] = {
    "machine": Section(
        module="machine_facts",
        share=85,
        what="machine, driver, torch, compiler, clocks; the CUDA library is compiled, or found",
    ),
    "kernels": Section(
        module="kernel_tests",
        share=60,
        packages=("pytest",),
        what="values, gradients, ties, bad input, sizes, streams, graphs and compilation of every CUDA kernel",
    ),
    "sanitizer": Section(
        module="sanitizers",
        share=45,
        programs=("compute-sanitizer",),
        what="every kernel of ours on small shapes under memcheck, racecheck, initcheck and synccheck",
    ),
    "quantizer": Section(
        module="quantizer_speed",
        share=30,
        what="nearest code and entropy penalty beside eager, compiled and chunked references",
    ),
    "golden": Section(
        module="golden", share=40, what="S-S, S-S 2D and GPT-B against the original's vectors, in fp32, bf16 and fp16"
    ),
    "step": Section(
        module="step_parity",
        share=40,
        packages=FROZEN,
        what="a training step of S-S with every loss in fp32, GPU against CPU",
    ),
    "training-speed": Section(
        module="step_speed",
        share=90,
        packages=(*TRAINING, *FROZEN),
        what="throughput, MFU and waits of training steps in bf16, eager and compiled",
    ),
    "sampling-speed": Section(
        module="sampler_speed", share=40, what="codes per second of the sampler, equal codes, independence of the batch"
    ),
    "copies": Section(module="copies", share=10, what="whether batches travel to the device behind the step"),
    "engines": Section(
        module="engines",
        share=40,
        packages=TRAINING,
        what="ten steps at ZeRO 1, 2 and 3 by DeepSpeed against one process on the CPU; checkpoint and resume",
    ),
}
TOTAL = sum(section.share for section in SECTIONS.values())


def programs_path() -> str:
    """PATH, and where a CUDA toolkit has its programs."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)])
