"""The Markdown report of run_all.py."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path

import machine
from benchmark_list import LONG
from figures import Figure, Outcome

PACKAGES = ("torch", "deepspeed", "megatron-core")
HEAD = "| benchmark | case | ours | reference | ratio | notes |\n| --- | --- | --- | --- | --- | --- |"
EXPLANATION = """Ours and its reference ran on this machine in the same minutes. A ratio says what it is of: "2 x
faster" and "2 x smaller" are in favour of ours, below 1 it is slower or larger. Milliseconds and megabytes compare
within a row only."""
_COMMIT_FILES = (".", ":(exclude)benchmarks/results")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how a run of all was started."""

    command: str
    quick: bool
    commit: str | None
    modified: bool
    gpus: list[str]
    load: float
    day: date = field(default_factory=date.today)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one benchmark. `failure` is why it counts as failed, if it does."""

    name: str
    command: str
    minutes: float = 0.0
    outcome: Outcome = field(default_factory=Outcome)
    failure: str | None = None


def setting(command: str, quick: bool, checkout: Path) -> Setting:
    commit, changes = _git(checkout, "rev-parse", "HEAD"), _git(checkout, "status", "--porcelain", "--", *_COMMIT_FILES)
    return Setting(command=command, quick=quick, commit=commit, modified=bool(changes), gpus=machine.gpus(),
                   load=os.getloadavg()[0])


def report(where: Setting, results: list[Result], unfinished: int) -> str:
    """The report's text. `unfinished` benchmarks are still to come."""
    spent = f"{len(results)} benchmarks, {sum(result.minutes for result in results):.1f} minutes"
    remarks = ["**quick: figures mean little.**"] * where.quick
    remarks += [f"**Unfinished: {unfinished} benchmarks are still to come.**"] * bool(unfinished)
    long = [f"- `python benchmarks/{script}`: {what}" for script, what in LONG.items()]
    commands = [f"- {result.name}, {result.minutes:.1f} minutes: `{result.command}`" for result in results
                if result.outcome.skipped is None]
    blocks = [f"# Benchmarks, {where.day}", " ".join([f"Written by `{where.command}`: {spent}.", *remarks]),
              "\n".join(f"- {name}: {value}" for name, value in facts(where).items()), EXPLANATION,
              "\n".join([HEAD, *(line for result in results for line in _lines(result, where.quick))]),
              "## Commands", "\n".join(commands), "## Long proofs, run by themselves", "\n".join(long)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def facts(where: Setting) -> dict[str, str]:
    """What machine, commit and packages a run was of."""
    memory = machine.memory_gb()
    hardware = [machine.processor(), f"{machine.cores()} cores", f"{memory:.0f} GB of memory" if memory else "",
                ", ".join(where.gpus) or "no GPU"]
    versions = [f"python {platform.python_version()}", *(f"{name} {_version(name)}" for name in PACKAGES)]
    changed = " with changes that are not committed" if where.modified else ""
    return {"machine": ", ".join(filter(None, hardware)), "load at the start": f"{where.load:.1f}",
            "commit": f"{where.commit or 'unknown'}{changed}", "versions": ", ".join(versions)}


def _lines(result: Result, quick: bool) -> list[str]:
    lines = [_line(result.name, figure.case, *_cells(figure, quick)) for figure in result.outcome.figures]
    if result.outcome.skipped is not None:
        lines.append(_line(result.name, "skipped", "", "", "", result.outcome.skipped))
    if result.failure is not None:
        lines.append(_line(result.name, "**failed**", "", "", "", result.failure))
    return lines


def _cells(figure: Figure, quick: bool) -> tuple[str, str, str, str]:
    reference = (
        "" if figure.reference is None else f"{amount(figure.reference)} {figure.unit} ({figure.reference_name})"
    )
    ratio = "" if figure.ratio is None else f"{amount(figure.ratio)} {figure.direction}"
    target = f"target {figure.target}" if figure.target else ""
    if target and not quick:  # targets are for the whole setting
        target += f": {'met' if figure.met else '**missed**'}"
    return f"{amount(figure.ours)} {figure.unit}", reference, ratio, "; ".join(filter(None, [target, figure.notes]))


def amount(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _line(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git(folder: Path, *words: str) -> str | None:
    try:
        finished = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout.strip() if finished.returncode == 0 else None
