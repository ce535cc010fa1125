"""A published row measured again: every stage from standalone checkpoints, then ours beside the published figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from gigatok_ds.checkpoint.standalone import described_config
from gigatok_ds.config.load import load_recipe
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.results import RESULTS, Results, read_figures, write_results
from gigatok_ds.ownership import owned
from gigatok_ds.studies.guidance_search import search_guidance
from gigatok_ds.studies.published_results import ROWS, TOLERANCES, Row
from gigatok_ds.studies.sampling_stages import GenerationSetup, Trial, generation_stages, remove_samples
from gigatok_ds.studies.stages import Launcher, Stage


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What a row needs: standalone checkpoints, data, weights. `allow`: what may differ from the published setting."""

    out: Path
    tokenizer: Path
    inception: str
    gpt: Path | None = None
    val: str | None = None
    train: str | None = None
    reference: Path | None = None
    vgg: str | None = None
    count: int = 50_000
    probe: tuple[str, ...] = ()  # further arguments of `gigatok-ds probe`
    device: str = "cpu"
    workers: int = 0
    batch_size: int = 32
    allow: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure; ours is None where it was not measured."""

    name: str
    ours: float | None
    published: float
    tolerance: float

    @property
    def verdict(self) -> str:
        if self.ours is None:
            return "not measured"
        return "reproduced" if abs(self.ours - self.published) <= self.tolerance + 1e-9 else "differs"


def row_named(name: str) -> Row:
    if name not in ROWS:
        raise InputError(f"there is no row {name!r}; choose one of {', '.join(ROWS)}")
    return ROWS[name]


def check_materials(row: Row, materials: Materials) -> None:
    """InputError when something is missing, does nothing, or the checkpoints are not of the row's models."""
    needed = ["val", "vgg"] if row.gpt is None else ["gpt", "reference"]
    for name in needed:
        if getattr(materials, name) is None:
            raise InputError(f"this row needs --{name}")
    surplus = ["gpt", "train", "reference"] if row.gpt is None else ["vgg"]
    for name in surplus:
        if getattr(materials, name) is not None:
            raise InputError(f"--{name} does nothing for this row; leave it out")
    if row.gpt is not None and (materials.train is None) != (materials.val is None):
        raise InputError("the probe needs both --train and --val; without it give neither")
    if "model" in materials.allow:
        return
    for kind, recipe, path in (("tokenizer", row.tokenizer, materials.tokenizer), ("gpt", row.gpt, materials.gpt)):
        if recipe and path and described_config(path, kind) != load_recipe(recipe).model:
            raise InputError(
                f"{path} is not the model of the recipe {recipe}, which this row is about; give that, or say "
                "--allow model"
            )


def reproduce(name: str, materials: Materials, launcher: Launcher) -> list[Comparison]:
    """Run or resume what the row needs; the comparison is also left in `out`, as results.json, .md and .html."""
    row = row_named(name)
    check_materials(row, materials)
    with nullcontext() if launcher.dry_run else owned(materials.out):
        return _reproduced(name, row, materials, launcher)


def _reproduced(name: str, row: Row, materials: Materials, launcher: Launcher) -> list[Comparison]:
    figures = _tokenizer(materials, launcher) if row.gpt is None else _generator(row, materials, launcher)
    if launcher.dry_run:
        return []
    comparisons = compare(row, figures)
    measured = {**figures, **{f"published {c.name}": c.published for c in comparisons}}
    settings = {c.name: f"{c.verdict} (tolerance {c.tolerance:g})" for c in comparisons}
    write_results(materials.out, Results(title=f"{name}: ours and published", figures=measured, settings=settings))
    return comparisons


def compare(row: Row, figures: Mapping[str, float]) -> list[Comparison]:
    return [Comparison(name=name, ours=figures.get(name), published=value, tolerance=TOLERANCES[name])
            for name, value in row.published.items()]


def _allowed(materials: Materials, *kinds: str) -> list[str]:
    return [word for allowed in materials.allow if allowed in kinds for word in ("--allow", allowed)]


def _tokenizer(materials: Materials, launcher: Launcher) -> dict[str, float]:
    out = materials.out / "reconstruction"
    arguments = ["evaluate", "reconstruction", materials.tokenizer, materials.val, "--inception", materials.inception,
                 "--vgg", materials.vgg, "--device", materials.device, "--workers", materials.workers, "--batch-size",
                 materials.batch_size, *_allowed(materials, "count"), "--out", out]
    launcher.run([Stage(name="reconstruction", arguments=arguments, done=out / RESULTS)])
    return read_figures(out) or {}


def _generator(row: Row, materials: Materials, launcher: Launcher) -> dict[str, float]:
    guidance, gpt, reference = row.guidance, materials.gpt, materials.reference
    assert guidance is not None and gpt is not None and reference is not None, "see check_materials"
    setup = GenerationSetup(
        gpt=gpt, tokenizer=materials.tokenizer, reference=reference, inception=materials.inception,
        count=materials.count, batch_size=materials.batch_size, device=materials.device,
        allow=tuple(allowed for allowed in materials.allow if allowed != "model"))
    if guidance.scale is not None:
        trial = Trial(schedule=guidance.schedule, scale=guidance.scale, window_start=guidance.window_start)
        folder = materials.out / "generation"
        launcher.run(generation_stages(setup, trial, folder))
        figures = read_figures(folder) or {}
        if figures and not launcher.dry_run:
            remove_samples(folder)
    elif launcher.dry_run:
        print(f"# a search for the guidance scale, from {guidance.start}: see gigatok-ds search-guidance --help")
        figures = {}
    else:
        assert guidance.start is not None, "neither a scale nor a search"
        _, figures = search_guidance(setup, materials.out / "search", launcher, schedule=guidance.schedule,
                                     start=guidance.start, window_start=guidance.window_start)
    if materials.train is not None and materials.val is not None:
        launcher.run([probe_stage(materials.tokenizer, gpt, materials.train, materials.val,
                                  materials.out / "probe", materials.device, materials.workers, materials.probe)])
        figures = {**figures, **(read_figures(materials.out / "probe") or {})}
    return figures


def probe_stage(tokenizer: Path, gpt: Path, train: str, val: str, out: Path, device: str, workers: int,
                more: tuple[str, ...] = ()) -> Stage:
    arguments = ["probe", tokenizer, "--gpt", gpt, "--train", train, "--val", val, "--device", device, "--workers",
                 workers, *more, "--out", out]
    return Stage(name="linear probe", arguments=arguments, done=out / RESULTS)


def as_json(comparisons: list[Comparison]) -> str:
    return json.dumps([{**vars(c), "verdict": c.verdict} for c in comparisons], indent=2)
