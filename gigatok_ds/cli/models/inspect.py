"""Say what is at a path: a training run, a training checkpoint, a standalone model or an original `.pt`.

  gigatok-ds inspect runs/ss                                   every checkpoint: step, size, topology, whether complete
  gigatok-ds inspect runs/ss/checkpoints/step-0390000 --check  and compare every file with its SHA-256
  gigatok-ds inspect checkpoints/tokenizer-ss --json           everything, configuration and hashes included

Nothing in a file is executed, and weights are not loaded.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

HELP = "say what a run, a checkpoint or a .pt is, and whether it is whole"
_LONG = ("recipe", "model", "classes", "sha256")  # sections that only --json gives in full


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="what to look at")
    parser.add_argument("--check", action="store_true", help="read everything and compare it with its SHA-256")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """0, or 1 when --check finds something damaged."""
    from gigatok_ds.checkpoint.inspection import inspect
    from gigatok_ds.untrusted import printable

    found = inspect(args.path, check=args.check)
    print(json.dumps(_finite(found), indent=2, allow_nan=False) if args.json
          else "\n".join(map(printable, _lines(found))))
    return int(any(part.get("damaged") for part in [found, *found.get("checkpoints", [])]))


def _finite(value):
    """The same with null for numbers that are not finite, which JSON has no names for."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(found: dict, indent: str = ""):
    for name, value in found.items():
        if name in _LONG:
            yield f"{indent}{name}: {_summary(name, value)}"
        elif isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield f"{indent}{name}:"
            for item in value:
                yield f"{indent}- {_one_line(item)}"
        else:
            yield f"{indent}{name}: {_value(name, value)}"


def _one_line(checkpoint: dict) -> str:
    if not checkpoint["complete"]:
        return f"{Path(checkpoint['path']).name}: DAMAGED: {checkpoint['damaged']}"
    topology = checkpoint["topology"]
    figures = "".join(f", {name} {value:.4g}" for name, value in checkpoint["metrics"].items())
    state = f", DAMAGED: {checkpoint['damaged']}" if checkpoint.get("damaged") else ""
    return (f"step {checkpoint['step']}: complete, {_value('bytes', checkpoint['bytes'])}, {topology['ranks']} ranks "
            f"(tensor {topology['tensor']}, data {topology['data']}, ZeRO {topology['zero_stage']}){figures}{state}")


def _summary(name: str, value: dict | list | None) -> str:
    if not value:
        return "none"
    if name == "sha256" and isinstance(value, dict):
        return f"of {len(value)} files (--json)"
    if isinstance(value, str):
        return value
    if name == "classes":
        return f"{len(value)} names, from {value[0]} to {value[-1]} (--json)"
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']} (--json)"
    return f"{len(value)} settings (--json)"


def _value(name: str, value) -> str:
    if name == "bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.2f} MB"
    if name in ("numbers", "parameters"):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "yes" if value is True else "no" if value is False else "none" if value is None else str(value)
