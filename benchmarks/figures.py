"""How a benchmark hands its figures to run_all.py: rows in a JSON file, so that nobody reads printed text.

A benchmark calls `add_option` on its parser and `write` at its end. A file that is there says that everything was
measured; whether ours met its targets is in the rows, and what proves a comparison void is in `problems`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gigatok_ds.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row. `ours` and `reference` are in `unit`, and of the same run."""

    case: str
    unit: str
    ours: float
    reference: float | None = None  # None: there is nothing to compare with
    reference_name: str = ""
    ratio: float | None = None
    direction: str = ""  # what the ratio says of ours: "x faster", "x smaller", "x the theory"
    target: str = ""  # as in "at least 1.3"; empty: none
    met: bool | None = None
    notes: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a benchmark left: rows, or why there are none. Rows with problems prove nothing."""

    figures: list[Figure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: str | None = None


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too (for run_all.py)")


def write(path: Path | None, figures: Sequence[Figure], problems: Sequence[str] = ()) -> None:
    """Write the rows, if `path` was given."""
    _write(path, Outcome(figures=list(figures), problems=list(problems)))


def skip(path: Path | None, reason: str) -> None:
    """Say that nothing can be measured here: something that the benchmark needs is absent."""
    _write(path, Outcome(skipped=reason))


def _write(path: Path | None, outcome: Outcome) -> None:
    if path:
        write_atomically(path, (json.dumps(asdict(outcome), indent=1) + "\n").encode())


def read(path: Path) -> Outcome:
    found = json.loads(path.read_text())
    return Outcome(**found | {"figures": [Figure(**row) for row in found["figures"]]})


def at_least(target: float | None, ratio: float) -> dict[str, str | bool]:
    """The two fields of a Figure whose ratio has a lower bound, or none."""
    return {} if target is None else {"target": f"at least {target:g}", "met": ratio >= target}
