"""Makes the dry runs that come with the package (`plan_cache.json`), after a change that moves their figures (a few
minutes):

  python -m gigatok_ds.planning.renew

`tests/planning/test_plan.py` computes them again and compares.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from tqdm import tqdm

from gigatok_ds.config.load import load_recipe, recipe_names
from gigatok_ds.dry_run.by_layers import rehearse
from gigatok_ds.dry_run.dry_run import shapes_of
from gigatok_ds.files import write_atomically
from gigatok_ds.planning.cluster import parse_cluster
from gigatok_ds.planning.plan_cache import FILE, key_of
from gigatok_ds.planning.planner import REHEARSED, PlannedLayout, Planner
from gigatok_ds.planning.speed import Assumptions


def dry_runs(name: str) -> Iterator[tuple[str, list | dict]]:
    """Key and result of each dry run of a packaged recipe without tensor parallelism."""
    recipe = load_recipe(name)
    yield key_of(recipe), dataclasses.asdict(shapes_of(recipe))
    planner = Planner(recipe, parse_cluster("1x1xH100"), Assumptions())
    for recompute in planner.recompute_choices:
        layout = PlannedLayout(tensor=1, sequence=False, stage=1, micro=REHEARSED, recompute=recompute)
        for step in planner.steps:
            spread = layout.applied_to(recipe)
            found = rehearse(spread, REHEARSED, step, compiled=planner.compiled)
            yield key_of(spread, REHEARSED, step, planner.compiled), found.as_list()


def main() -> None:
    found: dict[str, list | dict] = {}
    for name in tqdm(recipe_names(), unit="recipe"):
        found |= dry_runs(name)
    write_atomically(FILE, json.dumps(found, separators=(",", ":")).encode() + b"\n")


if __name__ == "__main__":
    main()
