"""A section's own process."""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from acceptance.findings import Findings
from acceptance.sections import SECTIONS


@dataclass(frozen=True, kw_only=True)
class Setting:
    """device: what is looked at, cuda or cpu. quick: in the smallest form. folder: for files that go with the section.
    """

    device: str
    quick: bool
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def synchronise(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()


def run(name: str, seconds: str, options: argparse.Namespace) -> int:
    """Find out all that a section is about, within so many seconds."""
    findings = Findings(options.out / f"{name}.json", deadline=time.monotonic() + float(seconds))
    module = importlib.import_module(f"acceptance.{SECTIONS[name].module}")
    with tempfile.TemporaryDirectory() as folder:
        module.run(Setting(device=options.device, quick=options.quick, folder=Path(folder)), findings)
    findings.finish()
    return 0
