"""What an evaluation leaves: results.json, results.md and results.html with its pictures in it."""

from __future__ import annotations

import base64
import html
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from gigatok_ds.errors import InputError
from gigatok_ds.files import write_atomically
from gigatok_ds.plain import from_plain
from gigatok_ds.untrusted import as_markdown, printable, read_json

RESULTS, _MARKDOWN, _HTML = "results.json", "results.md", "results.html"
FORMAT = "gigatok-ds-results/1"  # in each of them
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1f2430}
table{border-collapse:collapse}th,td{text-align:left;padding:.3rem 1rem .3rem 0;border-bottom:1px solid #e3e6eb}
td{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}img{max-width:100%}figure{margin:2rem 0}"""


@dataclass(frozen=True, kw_only=True)
class Results:
    """title: what was evaluated; figures: numbers by name; settings: everything they depend on; pictures: PNG by
    caption.
    """

    title: str
    figures: Mapping[str, float]
    settings: Mapping[str, object]
    pictures: Mapping[str, bytes] = field(default_factory=dict)


def check_results(folder: Path) -> None:
    """InputError, naming it, when `write_results` would replace a file that is not ours: one without FORMAT in it."""
    for name in (RESULTS, _MARKDOWN, _HTML):
        path = folder / name
        if path.exists() and not (path.is_file() and FORMAT.encode() in path.read_bytes()):
            raise InputError(f"{path} is there and was not written by this program, so it is left alone; choose "
                             "another --out or remove it")
    pictures = sorted(folder.glob("picture-*.png"))
    if pictures and not (folder / _MARKDOWN).exists():
        raise InputError(f"{pictures[0]} is there and belongs to no results of ours, so it is left alone; choose "
                         "another --out or remove it")


def write_results(folder: Path, results: Results) -> None:
    """Write the three files; results.json last, so that it is there only if all is. Raises what `check_results` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_results(folder)
    write_atomically(folder / _MARKDOWN, _markdown(results).encode())
    for number, picture in enumerate(results.pictures.values(), 1):
        write_atomically(folder / f"picture-{number}.png", picture)
    write_atomically(folder / _HTML, _html(results).encode())
    full = {"format": FORMAT, "title": results.title, "figures": dict(results.figures),
             "settings": dict(results.settings)}
    write_atomically(folder / RESULTS, (json.dumps(full, indent=2, default=str) + "\n").encode())


def read_figures(folder: Path) -> dict[str, float] | None:
    """The figures of an evaluation that has ended, None of one that has not."""
    if not (folder / RESULTS).is_file():
        return None
    return from_plain(dict[str, float], read_json(folder / RESULTS).get("figures"), f"{folder / RESULTS}: figures")


def numeric_settings(device: torch.device) -> dict[str, object]:
    """What arithmetic and software the figures come from."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "tf32_products": torch.backends.cuda.matmul.allow_tf32 if device.type == "cuda" else False,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32 if device.type == "cuda" else False,
        "torch": torch.__version__,
    }


def png_bytes(pixels: np.ndarray) -> bytes:
    """uint8 (height, width, 3) as a PNG file's content."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def in_words(value: object) -> str:
    """Six significant digits of a number, integers as they are."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _rows(results: Results) -> list[tuple[str, str, list[tuple[str, str]]]]:
    figures = [(printable(name), in_words(value)) for name, value in results.figures.items()]
    settings = [(printable(name), printable(value if isinstance(value, str) else json.dumps(value, default=str)))
                for name, value in results.settings.items()]
    return [("figure", "value", figures), ("setting", "value", settings)]


def _markdown(results: Results) -> str:
    lines = [f"# {as_markdown(results.title)}", ""]
    for left, right, rows in _rows(results):
        lines += [f"| {left} | {right} |", "| --- | --- |"]
        lines += [f"| {as_markdown(name)} | {as_markdown(text)} |" for name, text in rows] + [""]
    for number, caption in enumerate(results.pictures, 1):
        lines += [f"{as_markdown(caption)}:", "", f"![{as_markdown(caption)}](picture-{number}.png)", ""]
    return "\n".join([*lines, f"<!-- {FORMAT} -->", ""])


def _html(results: Results) -> str:
    tables = "".join(
        f"<table><tr><th>{left}<th>{right}</tr>"
        + "".join(f"<tr><td>{html.escape(name)}<td>{html.escape(text)}</tr>" for name, text in rows) + "</table><br>"
        for left, right, rows in _rows(results))
    figures = "".join(
        f'<figure><img alt="{html.escape(printable(caption))}" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        f"<figcaption>{html.escape(printable(caption))}</figcaption></figure>"
        for caption, picture in results.pictures.items())
    title = html.escape(printable(results.title))
    head = f'<meta charset="utf-8"><meta name="generator" content="{FORMAT}">'
    return (f'<!doctype html><html lang="en">{head}<title>{title}</title><style>{_STYLE}</style>'
            f"<h1>{title}</h1>{tables}{figures}</html>\n")
