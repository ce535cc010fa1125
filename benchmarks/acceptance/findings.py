"""What a section has found so far: checks that hold or not, and figures. In a file after each, so that a kill loses
nothing.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gigatok_ds.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something that has to hold. `detail` is one line: what was seen, and its bound."""

    name: str
    holds: bool
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Something that was measured, for which there is no right or wrong."""

    name: str
    value: float
    unit: str
    notes: str = ""


@dataclass
class Findings:
    """Of one section.

    notes: facts in words; lacking: why all of it, or some of it, could not be looked at; finished: whether it came to
    its end.
    """

    path: Path
    deadline: float = float("inf")  # by time.monotonic
    checks: list[Check] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    finished: bool = False

    def check(self, name: str, holds: bool, detail: str = "") -> None:
        self.checks.append(Check(name=name, holds=bool(holds), detail=detail))
        self._write()

    def figure(self, name: str, value: float, unit: str, notes: str = "") -> None:
        self.figures.append(Figure(name=name, value=float(value), unit=unit, notes=notes))
        self._write()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._write()

    def lacks(self, reason: str) -> None:
        self.lacking.append(reason)
        self._write()

    def finish(self) -> None:
        self.finished = True
        self._write()

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def has_time(self, name: str, seconds: float) -> bool:
        """Whether `seconds` are left for what is called `name`; says that it is left out if not."""
        if self.seconds_left() >= seconds:
            return True
        self.lacks(f"{name}: no time was left for it ({seconds:g} s)")
        return False

    def _write(self) -> None:
        content = self.as_dict() | {"finished": self.finished}
        write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())

    def as_dict(self) -> dict:
        """What was found, as JSON has it."""
        return {"checks": [asdict(check) for check in self.checks],
                "figures": [asdict(figure) for figure in self.figures], "notes": self.notes, "lacking": self.lacking}


def read(path: Path) -> Findings:
    """What a section left; nothing if it left nothing."""
    if not path.exists():
        return Findings(path)
    found = json.loads(path.read_text())
    return Findings(path, checks=[Check(**check) for check in found["checks"]],
                    figures=[Figure(**figure) for figure in found["figures"]],
                    notes=found["notes"], lacking=found["lacking"], finished=found["finished"])
