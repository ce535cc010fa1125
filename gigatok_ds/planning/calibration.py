"""Assumptions corrected by what a real run took."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.recipe import Recipe, TokenizerRecipe
from gigatok_ds.errors import InputError
from gigatok_ds.monitoring.history import read_history
from gigatok_ds.monitoring.metrics import read_metrics
from gigatok_ds.planning.cluster import Cluster
from gigatok_ds.planning.planner import BLOCKS, EVERYTHING, NOTHING, PlannedLayout, Planner
from gigatok_ds.planning.speed import Assumptions
from gigatok_ds.untrusted import is_number, read_json, reading

_SHORTEST = 1e-9  # seconds of a step: less is no measurement
ENOUGH = 3  # logging steps, without the first, which warms up


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run tells: its recipe, layout, ranks, and the median seconds of its steps."""

    recipe: Recipe
    layout: PlannedLayout
    ranks: int
    seconds: float


def read_run(run_dir: Path) -> Measured:
    """Raises InputError for what is no run, or has logged too little."""
    for name in ("recipe.yaml", "deepspeed.json", "history.jsonl", "metrics.jsonl"):
        if not (run_dir / name).is_file():
            raise InputError(f"--calibrate {run_dir} is not a training run: it has no {name}")
    recipe, settings = load_recipe(str(run_dir / "recipe.yaml")), read_json(run_dir / "deepspeed.json")
    seconds = [line["throughput/step_seconds"] for line in read_metrics(run_dir)
               if is_number(line.get("throughput/step_seconds"), _SHORTEST)][1:]
    if len(seconds) < ENOUGH:
        raise InputError(f"--calibrate {run_dir} has logged {len(seconds)} times after its first steps; at least "
                         f"{ENOUGH} are needed")
    ranks = next((line.get("ranks") for line in reversed(read_history(run_dir)) if line["event"] == "started"), None)
    if type(ranks) is not int or ranks < 1:
        raise InputError(f"--calibrate {run_dir}: its history does not say on how many ranks it was started")
    parallel = recipe.parallel
    if parallel.recompute_every > 1:
        raise InputError(f"--calibrate {run_dir}: parallel.recompute_every is {parallel.recompute_every}; calibrate "
                         "from a run with 0 or 1")
    recompute = NOTHING if not parallel.recompute_every else BLOCKS
    if isinstance(recipe, TokenizerRecipe) and recipe.parallel.recompute_cnn:
        recompute = EVERYTHING
    with reading(run_dir / "deepspeed.json"):
        stage, micro = settings["zero_optimization"]["stage"], settings["train_micro_batch_size_per_gpu"]
        if type(stage) is not int or stage not in range(4) or type(micro) is not int or micro < 1:
            raise ValueError(f"its ZeRO stage is {stage!r}, its micro batch {micro!r}")
    layout = PlannedLayout(tensor=parallel.tensor, sequence=parallel.sequence, stage=stage, micro=micro,
                           recompute=recompute)
    return Measured(recipe=recipe, layout=layout, ranks=ranks, seconds=statistics.median(seconds))


def calibrated(assumptions: Assumptions, runs: list[Path], cluster: Cluster) -> Assumptions:
    """Step times scaled by the geometric mean of measured / predicted of these runs, which ran on `cluster`'s devices.
    """
    ratios = []
    for run_dir in runs:
        measured = read_run(run_dir)
        per_host = min(measured.ranks, cluster.per_host)
        if measured.ranks % per_host:
            raise InputError(f"--calibrate {run_dir} ran on {measured.ranks} ranks, which are not whole hosts of "
                             f"{per_host}")
        there = replace(cluster, hosts=measured.ranks // per_host, per_host=per_host)
        predicted = Planner(measured.recipe, there, assumptions).plan(measured.layout)
        ratios.append(measured.seconds / predicted.time.seconds)
    return replace(assumptions, measured=statistics.geometric_mean(ratios))
