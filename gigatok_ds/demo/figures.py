"""The demo's pictures, as PNG files: reconstructions, samples and loss curves.

Figures are drawn without pyplot, which keeps global state and may look for a display.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.image_metrics import make_grid, to_uint8

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 128  # a power of two: pixels / DPI * DPI is exact
MAX_CLASSES = 50  # rows of a sample grid
_LOG_SCALE_FROM = 5.0  # largest over smallest value
_INK, _MUTED, _LINES = "#1f2430", "#5b6270", "#e3e6eb"
# Okabe and Ito's palette, told apart by colour-blind readers.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLE: dict[Any, Any] = {  # matplotlib has a type of all its settings' names
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": "#b8bec9",
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": _LINES,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def reconstruction_grid(path: str | Path, originals: Tensor, reconstructions: Tensor,
                        psnr_values: Sequence[float], *, columns: int = 8) -> None:
    """Pairs of images, the original above its reconstruction with the PSNR in dB below, `columns` to a row.

    originals, reconstructions: (B, 3, S, S) floats in [-1, 1], clamped or not. psnr_values: B numbers.
    """
    assert originals.shape == reconstructions.shape and len(originals) == len(psnr_values) > 0
    columns = min(columns, len(originals))
    side, gap, caption = _tile_side(originals.shape[-1], 96), 4, 30
    margin = 118  # room for the names of the rows
    rows = math.ceil(len(originals) / columns)
    pair = 2 * side + gap + caption
    figure = _canvas(margin + columns * (side + gap), rows * pair + gap)
    for row in range(rows):
        shown = slice(row * columns, (row + 1) * columns)
        tiles = torch.stack([_resized(batch[shown], side) for batch in (originals, reconstructions)])
        top = gap + row * pair
        _place(figure, make_grid(tiles, gap=gap), left=margin, top=top)
        for name, offset in (("original", side / 2), ("reconstruction", 1.5 * side + gap)):
            _text(figure, name, margin - 10, top + offset, ha="right", color=_MUTED)
        for column, value in enumerate(psnr_values[shown]):
            center = margin + column * (side + gap) + side / 2
            _text(figure, f"{value:.1f} dB", center, top + pair - gap - caption / 2, ha="center")
    _save(figure, path)


def sample_grid(path: str | Path, images: Tensor, class_names: Sequence[str]) -> None:
    """One row of samples for each class, with the class's name; beyond MAX_CLASSES only the first ones.

    images: (classes, n, 3, S, S) floats in [-1, 1]; they need not be clamped.
    """
    assert len(images) == len(class_names) > 0
    images, names = images[:MAX_CLASSES], [_shortened(name) for name in class_names[:MAX_CLASSES]]
    classes, count, _, size, _ = images.shape
    side, gap = _tile_side(size, 64), 3
    margin = 24 + 9 * max(map(len, names))
    bottom = 30 if len(class_names) > MAX_CLASSES else gap
    height = classes * (side + gap)
    figure = _canvas(margin + count * (side + gap), gap + height + bottom)
    tiles = _resized(images.flatten(0, 1), side).unflatten(0, (classes, count))
    _place(figure, make_grid(tiles, gap=gap), left=margin, top=gap)
    for row, name in enumerate(names):
        _text(figure, name, margin - 10, gap + row * (side + gap) + side / 2, ha="right")
    if len(class_names) > MAX_CLASSES:
        _text(figure, f"the first {MAX_CLASSES} of {len(class_names)} classes", margin,
              height + gap + bottom / 2, ha="left", color=_MUTED)
    _save(figure, path)


def loss_curves(path: str | Path, phases: Mapping[str, Sequence[Mapping[str, float]]],
                keys: Sequence[str]) -> None:
    """Those of `keys` that were logged, over steps: a phase's losses in one panel, each other key in its own.

    A loss is a key with a part "loss", as in "loss", "loss/reconstruction", "validation/loss". `phases` maps
    a name to the result of `monitoring.metrics.read_metrics`. What is not finite leaves a gap. Raises
    InputError when no phase holds any of the keys.
    """
    import matplotlib
    from matplotlib.figure import Figure

    panels = {f"{phase}: {title}": lines for phase, metrics in phases.items()
              for title, lines in _panels(_curves(metrics, keys)).items()}
    if not panels:
        raise InputError(f"there is nothing to draw: none of {', '.join(keys)} was logged")
    with matplotlib.rc_context(_STYLE):
        columns = math.ceil(math.sqrt(len(panels)))
        rows = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(5.2 * columns, 3.5 * rows), dpi=DPI, layout="constrained", facecolor="white")
        for number, (title, lines) in enumerate(panels.items(), 1):
            _draw_curves(figure.add_subplot(rows, columns, number), title, lines)
        _save(figure, path)


def _curves(metrics: Sequence[Mapping[str, float]], keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Per key an array (points, 2) of steps and values; keys without a finite value are left out."""
    found = {key: np.array([(line["step"], line[key]) for line in metrics if key in line], float)
             for key in keys}
    return {key: points for key, points in found.items() if len(points) and np.isfinite(points[:, 1]).any()}


def _panels(curves: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    panels: dict[str, dict[str, np.ndarray]] = {}
    for key, points in curves.items():
        panels.setdefault("losses" if _is_loss(key) else key, {})[key] = points
    return panels


def _is_loss(key: str) -> bool:
    return "loss" in key.split("/")


def _draw_curves(axes: Axes, title: str, lines: Mapping[str, np.ndarray]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for number, (key, points) in enumerate(lines.items()):
        axes.plot(points[:, 0], points[:, 1], label=key, color=_COLOURS[number % len(_COLOURS)],
                  marker="o" if len(points) <= 12 else None, markersize=3.5)
    values = np.concatenate([points[:, 1] for points in lines.values()])
    values = values[np.isfinite(values)]
    if all(map(_is_loss, lines)) and values.min() > 0 and values.max() > _LOG_SCALE_FROM * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if values.max() < 20 * values.min():  # too few powers of ten to read values from
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: _few_digits(value)))
        else:
            axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="both", length=0)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    if len(lines) > 1:
        axes.legend(fontsize=10)


def _few_digits(value: float) -> str:
    return f"{value:g}" if f"{value:.0e}"[0] in "25" else ""


def _tile_side(size: int, least: int) -> int:
    """Whole multiples enlarge small images to at least `least` pixels; images over twice that are reduced."""
    return min(size * math.ceil(least / size), 2 * least)


def _resized(images: Tensor, side: int) -> Tensor:
    """uint8 (B, 3, side, side) of images (B, 3, S, S): nearest neighbour to enlarge, Lanczos to reduce."""
    pixels = to_uint8(images.detach().cpu())
    if pixels.shape[-1] <= side:
        factor = side // pixels.shape[-1]
        return pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    reduced = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.LANCZOS)
               for image in pixels]
    return torch.from_numpy(np.stack([np.asarray(image) for image in reduced])).permute(0, 3, 1, 2)


def _shortened(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"


def _canvas(width: int, height: int) -> Figure:
    """An empty figure of exactly width x height pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")


def _place(figure: Figure, image: np.ndarray, *, left: int, top: int) -> None:
    """Copy `image` pixel by pixel to a place counted from the upper left corner."""
    height = round(figure.get_figheight() * DPI)
    figure.figimage(image, left, height - top - image.shape[0])


def _text(figure: Figure, text: str, x: float, y: float, *, ha: str, color: str = _INK) -> None:
    width, height = figure.get_size_inches() * DPI
    figure.text(x / width, 1 - y / height, text, ha=ha, va="center", color=color, fontsize=8,
                family=_STYLE["font.family"], parse_math=False)


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_bytes(buffer.getvalue())
    os.replace(scratch, path)
