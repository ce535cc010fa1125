"""Ten steps of a small tokenizer and a small GPT under DeepSpeed, against one process on the CPU; checkpoint and
resume.

Each run is `gigatok-ds train` in a process of its own, a few at a time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import machine
import torch
from processes import last_line
from training_runs import prepare

from acceptance.findings import Findings
from acceptance.section import Setting
from gigatok_ds.checkpoint.run_directory import complete_checkpoints
from gigatok_ds.monitoring.metrics import read_metrics

TOLERANCE = 1e-4  # relative; what is below 0.1 counts as 0.1
STEPS = 10
CHANGES = [f"training.steps={STEPS}", "checkpoint.every=5", f"training.validate_every={STEPS}", "optimizer.eps=1e-3",
           "training.compile=none"]
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
FULL_PRECISION = {"NVIDIA_TF32_OVERRIDE": "0"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training of one kind into folder/name. `launcher` starts it on several ranks."""

    kind: str
    name: str
    stage: int
    environment: dict[str, str] = field(default_factory=dict)
    launcher: tuple[str, ...] = ()


def run(setting: Setting, found: Findings) -> None:
    data = prepare(setting.folder)
    kinds, stages = (("gpt",), (3,)) if setting.quick else (("tokenizer", "gpt"), (1, 2, 3))
    runs = [Run(kind=kind, name=f"{kind}-{stage}", stage=stage) for kind in kinds for stage in stages]
    runs += [Run(kind=kind, name=f"{kind}-cpu", stage=0, environment=ON_CPU) for kind in kinds]
    if setting.on_gpu and torch.cuda.device_count() > 1:
        torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
        runs += [Run(kind=kind, name=f"{kind}-two", stage=2, launcher=torchrun) for kind in kinds]
    finished = set(_finished(runs, setting.folder, data, found))
    for kind in kinds:
        for name, what in [*((f"{kind}-{stage}", f"{kind}, ZeRO {stage}") for stage in stages),
                           (f"{kind}-two", f"{kind}, two GPUs, ZeRO 2")]:
            if {name, f"{kind}-cpu"} <= finished:
                _compare(found, what, setting.folder / name, setting.folder / f"{kind}-cpu")
    again = [_halfway(kind, setting.folder) for kind in kinds if f"{kind}-3" in finished]
    for name in _finished(again, setting.folder, data, found):
        _compare(found, f"{name.removesuffix('-again')}, ZeRO 3, resumed", setting.folder / name,
                 setting.folder / name.replace("again", "3"))


def _finished(runs: list[Run], folder: Path, data: dict[str, list[str]], found: Findings) -> Iterator[str]:
    """Names of the runs that came to their end; of another, a check says why not."""
    with ThreadPoolExecutor(max(1, min(4, machine.cores() // 3))) as pool:
        for run, code in zip(runs, pool.map(lambda run: _train(run, folder, data), runs), strict=True):
            if code:
                found.check(f"{run.name} trains", False, f"exit code {code}: {last_line(folder / f'{run.name}.log')}")
                print((folder / f"{run.name}.log").read_text(), flush=True)
            else:
                yield run.name


def _train(run: Run, folder: Path, data: dict[str, list[str]]) -> int:
    command = [sys.executable, "-m", *run.launcher, "gigatok_ds", "train", str(folder / f"{run.kind}.yaml"),
               "--out", str(folder / run.name), "--zero", str(run.stage), *data[run.kind], *CHANGES]
    with open(folder / f"{run.name}.log", "wb") as log:
        return subprocess.run(command, env=os.environ | FULL_PRECISION | run.environment, stdin=subprocess.DEVNULL,
                              stdout=log, stderr=subprocess.STDOUT, check=False).returncode


def _halfway(kind: str, folder: Path) -> Run:
    """A run that has the first half of another, as one that was killed has it."""
    again = Run(kind=kind, name=f"{kind}-again", stage=3)
    shutil.copytree(folder / f"{kind}-3", folder / again.name)
    shutil.rmtree(complete_checkpoints(folder / again.name)[-1][1])
    return again


def _compare(found: Findings, what: str, ours: Path, theirs: Path) -> None:
    figures, expected = _figures(ours), _figures(theirs)
    found.check(f"{what}: as many figures", figures.keys() == expected.keys() and bool(expected),
                f"{len(expected)} in {STEPS} steps")
    errors = {key: abs(figures[key] - expected[key]) / max(abs(expected[key]), 0.1)
              for key in figures.keys() & expected.keys()}
    if errors:
        worst = max(errors, key=errors.get)
        found.check(f"{what}: losses and gradient norms", errors[worst] <= TOLERANCE,
                    f"at most {errors[worst]:.1e} off ({worst[1]} of step {worst[0]}), bound {TOLERANCE:g}")


def _figures(run_dir: Path) -> dict[tuple[int, str], float]:
    """Losses and gradient norms of every step, the last that was told of each."""
    return {(row["step"], name): value for row in read_metrics(run_dir) for name, value in row.items()
            if name == "loss" or name.startswith(("loss/", "discriminator/", "grad_norm/"))}
