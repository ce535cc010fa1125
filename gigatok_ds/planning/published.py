"""Rehearsals of the published recipes, which come with the package, so that their plans take no time and no torch.

`tests/test_plan.py` rehearses again and compares. After a change that moves the figures, renew them (a minute):

  python -m gigatok_ds.planning.published
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from gigatok_ds.config.load import load_recipe, recipe_names, recipe_to_dict
from gigatok_ds.config.recipe import Recipe
from gigatok_ds.files import write_atomically
from gigatok_ds.planning.rehearsed import MicroBatch, Shapes, from_list

FILE = Path(__file__).with_suffix(".json")


def micro_batch(recipe: Recipe, samples: int, step: int, *, compiled: bool) -> MicroBatch:
    """What `rehearse` gives: looked up, or else rehearsed."""
    if known := _known().get(_key(recipe, samples, step, compiled)):
        return from_list(known)
    from gigatok_ds.planning.by_layers import rehearse

    return rehearse(recipe, samples, step, compiled=compiled)


def shapes(recipe: Recipe) -> Shapes:
    """What `shapes_of` gives: looked up, or else built."""
    if known := _known().get(_key(recipe)):
        return Shapes(**known)
    from gigatok_ds.planning.rehearsal import shapes_of

    return shapes_of(recipe)


@functools.cache
def _known() -> dict[str, list | dict]:
    """By key."""
    return json.loads(FILE.read_bytes())


def _key(recipe: Recipe, *call: int) -> str:
    """All that a rehearsal depends on."""
    settings, parallel = recipe_to_dict(recipe), recipe.parallel
    what = [settings["model"], settings.get("loss"), recipe.training.precision, parallel.tensor, parallel.sequence, call]
    if call:
        what += [parallel.recompute_every, getattr(parallel, "recompute_cnn", None)]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def rehearsals(name: str) -> Iterator[tuple[str, list | dict]]:
    """Of a packaged recipe without tensor parallelism: key and what is found, for whatever may be computed again."""
    from gigatok_ds.planning.by_layers import rehearse
    from gigatok_ds.planning.cluster import parse_cluster
    from gigatok_ds.planning.planner import REHEARSED, Layout, Planner
    from gigatok_ds.planning.rehearsal import shapes_of
    from gigatok_ds.planning.speed import Assumptions

    recipe = load_recipe(name)
    yield _key(recipe), dataclasses.asdict(shapes_of(recipe))
    planner = Planner(recipe, parse_cluster("1x1xH100"), Assumptions())
    for recompute in planner.recompute_choices:
        layout = Layout(tensor=1, sequence=False, stage=1, micro=REHEARSED, recompute=recompute)
        for step in planner.steps:
            spread = layout.applied_to(recipe)
            found = rehearse(spread, REHEARSED, step, compiled=planner.compiled)
            yield _key(spread, REHEARSED, step, planner.compiled), found.as_list()


def main() -> None:
    found = {}
    for name in recipe_names():
        print(name, file=sys.stderr)
        found |= rehearsals(name)
    write_atomically(FILE, json.dumps(found, separators=(",", ":")).encode() + b"\n")


if __name__ == "__main__":
    main()
