"""The demo's report: one HTML file with everything in it, to be opened from the disk."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from gigatok_ds.errors import InputError

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number; `passed` says whether it meets `target` (null: it has none)."""

    name: str
    value: float | int | str
    unit: str = ""
    target: str | None = None
    passed: bool | None = None
    explanation: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A foldable table of settings; nested mappings become dotted names."""

    title: str
    values: Mapping[str, object]
    open: bool = False


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """What the report says.

    facts: what was run, as (name, value). images: (caption, PNG file). files: (path relative to the report,
    what it holds). tokenizer_export, gpt_export: the standalone checkpoints, relative to the report.
    """

    title: str
    subtitle: str
    facts: list[tuple[str, str]]
    figures: list[Figure]
    images: list[tuple[str, Path]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    files: list[tuple[str, str]] = field(default_factory=list)
    tokenizer_export: str
    gpt_export: str


def write_report(path: str | Path, content: ReportContent) -> None:
    """Write `content` as one HTML file: styles and images inside, no scripts, nothing loaded from elsewhere.

    Raises InputError when an image is not a PNG, OSError when one cannot be read.
    """
    from jinja2 import Environment, StrictUndefined

    folder = resources.files("gigatok_ds.demo")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)
    environment.filters |= {"number": format_number, "png": _data_url, "rows": flatten, "link": quote,
                            "python": json.dumps}
    template = environment.from_string((folder / "report.html").read_text(encoding="utf-8"))
    targets = [figure.passed for figure in content.figures if figure.passed is not None]
    page = template.render(content=content, css=(folder / "report.css").read_text(encoding="utf-8"),
                           met=sum(targets), targets=len(targets))
    path = Path(path)
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(page, encoding="utf-8")
    os.replace(scratch, path)


def format_number(value: float | int | str) -> str:
    """Four significant digits for a float, groups of three for an integer, text as it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def flatten(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value) of every leaf, in order. Lists are leaves; what is not text becomes JSON."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, name + ".")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield name, text


def _data_url(path: str | Path) -> str:
    data = Path(path).read_bytes()
    if not data.startswith(_PNG):
        raise InputError(f"{path} is not a PNG image")
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
