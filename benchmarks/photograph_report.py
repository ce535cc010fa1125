"""What a run's metrics say of each term of its loss: figures, verdicts, curves."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gigatok_ds.config.recipe import TokenizerRecipe

SHARE = 0.05  # of the run's steps, over which all but the first value are means
SETTLED = 0.9  # of its peak, at most, where a term that has to rise first comes to rest
LOGIT_BOUND = 10.0  # the generator's adversarial term over its weight is a mean logit; a lost game goes to hundreds
EXPECTED = {
    "falls": "below its first value and its value after the warm-up",
    "rises": "above its first value",
    # Latents start out alike, next to a few codes: these terms rise while the latents spread out, then the codes adapt.
    "settles": f"at most {SETTLED:g} x its peak",
    "balanced": "between 0 and its first value",
    "used": "above a half: where all latents share a code, many terms fall for nothing",
    "bounded": f"never over {LOGIT_BOUND:g} x its weight, either sign",
}
_PHASE_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00")
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
          "grid.color": "#e3e6eb", "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
          "legend.frameon": False}


@dataclass(frozen=True, kw_only=True)
class Term:
    """A logged figure, what is expected of it, and the first and last step in which it is to be logged (None: any)."""

    key: str
    expected: str
    weight: float = 1.0
    first: int | None = None
    last: int | None = None


def terms_of(recipe: TokenizerRecipe) -> list[Term]:
    """Every term of the recipe's loss with its phase, PSNR and codebook usage."""
    loss, steps = recipe.loss, recipe.training.steps

    def term(name: str, expected: str = "falls", first: int = 1, end: int | None = None, weight: float = 1.0) -> Term:
        return Term(key=name, expected=expected, first=first, last=min(steps, (end or steps + 1) - 1), weight=weight)

    terms = [term("loss/reconstruction"), term("loss/codebook", "settles"), term("loss/commitment", "settles")]
    perceptual = ["perceptual"] if loss.perceptual else []
    terms += [term(f"loss/{name}") for name in perceptual]
    if loss.quantizer.entropy:
        terms.append(term("loss/entropy", end=loss.quantizer.entropy_end_step))
    if loss.semantic:
        terms.append(term("loss/semantic"))
    if loss.auxiliary:
        direct = ["direct_reconstruction", *(f"direct_{name}" for name in perceptual)]
        early = ["feature", *(direct if loss.auxiliary.direct_reconstruction else [])]
        terms += [term(f"loss/{name}", end=loss.auxiliary.end_step) for name in early]
    if loss.adversarial:
        start = max(1, loss.adversarial.start_step)
        terms.append(term("loss/adversarial", "bounded", start, weight=loss.adversarial.weight))
        terms.append(term("discriminator/discriminator", "balanced", start))
    figures = [Term(key="validation/psnr", expected="rises"), Term(key="validation/codebook_usage", expected="used")]
    return [each for each in terms if each.first <= each.last] + figures


def phases_of(recipe: TokenizerRecipe) -> dict[str, int]:
    """The steps at which the objective changes."""
    loss = recipe.loss
    found = {"warm-up of the learning rate ends": recipe.schedule.warmup_steps,
             "auxiliary terms end": loss.auxiliary and loss.auxiliary.end_step,
             "entropy term ends": loss.quantizer.entropy_end_step,
             "discriminator starts": loss.adversarial and loss.adversarial.start_step}
    return {name: step for name, step in found.items() if step and step <= recipe.training.steps}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a term did. `failure` says what was wrong with it, None when nothing was."""

    term: Term
    points: np.ndarray  # (n, 2): steps and values
    start: float
    warmed_up: float
    peak: float
    end: float
    failure: str | None


def judge(term: Term, metrics: Sequence[Mapping[str, float]], recipe: TokenizerRecipe) -> Verdict:
    """Whether `term` was there in its phase, and only then, and went where it should."""
    points = np.array([(line["step"], line[term.key]) for line in metrics if term.key in line], float).reshape(-1, 2)
    if not len(points):
        return Verdict(term=term, points=points, **dict.fromkeys(("start", "warmed_up", "peak", "end"), math.nan),
                       failure="never logged")
    steps, values = points.T
    width, warm_up = max(1, round(SHARE * recipe.training.steps)), recipe.schedule.warmup_steps
    after = (steps > steps[0] + warm_up) & (steps <= steps[0] + warm_up + width)
    start, end = values[0], values[steps > steps[-1] - width].mean()
    warmed_up = values[after].mean() if after.any() else math.nan
    peak = max(running_mean(values, width))
    if term.first is not None and (steps[0] != term.first or steps[-1] != term.last):
        failure = f"active in steps {steps[0]:.0f} to {steps[-1]:.0f}"
    else:
        met = {"falls": end < start and not end >= warmed_up, "rises": end > start, "settles": end <= SETTLED * peak,
               "used": end > 0.5, "balanced": 0 < end < start,
               "bounded": np.abs(values).max() <= LOGIT_BOUND * term.weight}[term.expected]
        failure = None if met else "missed"
    return Verdict(term=term, points=points, start=start, warmed_up=warmed_up, peak=peak, end=end, failure=failure)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Means over each `width` values in a row (over all of them where there are fewer)."""
    width = min(width, len(values))
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as a Markdown table."""
    lines = ["| term | steps | first | after the warm-up | peak | at the end | expected at the end | met |",
             "| --- " * 8 + "|"]
    for verdict in verdicts:
        first, last = verdict.points[[0, -1], 0] if len(verdict.points) else (math.nan, math.nan)
        values = (verdict.start, verdict.warmed_up, verdict.peak, verdict.end)
        figures = " | ".join("" if math.isnan(value) else f"{value:.4g}" for value in values)
        lines.append(f"| {verdict.term.key} | {first:.0f} to {last:.0f} | {figures} | "
                     f"{EXPECTED[verdict.term.expected]} | {verdict.failure or 'yes'} |")
    return "\n".join(lines)


def draw(path: Path, verdicts: Sequence[Verdict], phases: Mapping[str, int], steps: int) -> None:
    """A panel per term: each step in grey, the running mean in blue, the phases as vertical lines."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = [verdict for verdict in verdicts if len(verdict.points)]
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.6 * columns, 2.5 * rows + 0.4), dpi=100, layout="constrained", facecolor="white")
        for number, verdict in enumerate(shown, 1):
            axes = figure.add_subplot(rows, columns, number)
            _draw_term(axes, verdict, width=max(1, round(SHARE * steps / 2)))
            axes.set_xlim(0, steps)
            lines = [axes.axvline(step, color=colour, linewidth=1, linestyle="--")
                     for step, colour in zip(phases.values(), _PHASE_COLOURS, strict=False)]
        figure.legend(lines, list(phases), loc="outside lower center", ncols=len(phases))
        scratch = path.with_name(f".{path.name}.partial")
        figure.savefig(scratch, format="png", metadata={"Software": None})
    os.replace(scratch, path)


def _draw_term(axes, verdict: Verdict, width: int) -> None:
    steps, values = verdict.points.T
    few = len(steps) <= 4 * width
    axes.plot(steps, values, color="#0072b2" if few else "#c9ced8", linewidth=1.5 if few else 0.6)
    if not few:
        mean = running_mean(values, width)
        axes.plot(steps[width // 2 : width // 2 + len(mean)], mean, color="#0072b2", linewidth=1.5)
    if values.min() > 0 and values.max() > 20 * np.median(values):
        axes.set_yscale("log")
    axes.set_title(verdict.term.key)
