"""Branches of a run: new runs that continue from a checkpoint of its constant learning rate, on their own schedules.

So one long run with a constant rate (`schedule.kind` const, or wsd before its cool-down) serves cool-downs of several
lengths. A branch is, from its checkpoint on, what an uninterrupted run of the branch's recipe would have been. And
extensions: a run that goes on for more steps than it was begun for, in its own directory.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from gigatok_ds.checkpoint.run_directory import RECIPE_FILE, complete_checkpoints
from gigatok_ds.config.load import DATA_LOCATIONS, differing_keys, load_recipe
from gigatok_ds.config.recipe import Recipe, ScheduleConfig
from gigatok_ds.errors import InputError
from gigatok_ds.files import write_atomically
from gigatok_ds.training.schedules import lr_of_iteration

BRANCH_FILE = "branch.json"
# What a branch may have otherwise than the run it comes from: how long it is and how it cools down.
OWN_KEYS = ("name", "training.steps", "schedule.kind", "schedule.decay_fraction", "schedule.decay_shape",
            "schedule.end_lr")


def constant_until(schedule: ScheduleConfig, steps: int) -> float:
    """The last step of a run of that many after which the learning rate has not begun to fall.

    Raises InputError for a schedule without a constant phase.
    """
    if schedule.kind == "const":
        return math.inf
    if schedule.kind == "wsd":
        return steps - int(schedule.decay_fraction * steps)
    raise InputError(f"schedule.kind is {schedule.kind}, which has no phase of constant learning rate to branch from; "
                     "use wsd or const")


def branch_point(recipe: Recipe, source: Path) -> Path:
    """The checkpoint that a run of `recipe` continues from, given a run directory or one checkpoint of it.

    Of a run directory, the newest that is in the constant phase of both recipes. Raises InputError when there is none,
    or when the recipes differ in more than a branch may.
    """
    is_checkpoint = source.parent.name == "checkpoints"
    run_dir = source.parent.parent if is_checkpoint else source
    recipe_file = run_dir / RECIPE_FILE
    if not recipe_file.is_file():
        raise InputError(f"{source} is neither a run directory nor one of its checkpoints: there is no {recipe_file}")
    trunk = load_recipe(str(recipe_file))
    differing = [key for key in differing_keys(trunk, recipe) if key not in (*OWN_KEYS, *DATA_LOCATIONS)]
    if differing:
        raise InputError(f"a branch of {run_dir} must share its recipe, but {', '.join(differing)} differ; "
                         f"only {', '.join(OWN_KEYS)} may. A new phase with other settings starts from "
                         f"gigatok-ds convert {run_dir} OUT --to training --keep all --recipe ...")
    limit = min(constant_until(r.schedule, r.training.steps) for r in (trunk, recipe))
    allowed = [(step, path) for step, path in complete_checkpoints(run_dir)
               if step <= limit and (not is_checkpoint or path.name == source.name)]
    if not allowed:
        raise InputError(f"{source} has no complete checkpoint of step {limit} or earlier, where the learning rate is "
                         "constant in both recipes; branch from an earlier checkpoint, or make the branch longer "
                         "(training.steps)")
    step, path = allowed[-1]
    if step < recipe.schedule.warmup_steps:
        raise InputError(f"{path} is from the warm-up ({recipe.schedule.warmup_steps} steps); "
                         "branch from a later checkpoint")
    return path


def check_branch(recipe: Recipe, run_dir: Path, source: Path | None) -> Path | None:
    """Where a run into `run_dir` starts from: a checkpoint of another run, or None when it has its own or starts
    afresh.

    Raises InputError when the directory belongs to a branch whose origin is not given, or to something else.
    """
    recorded = run_dir / BRANCH_FILE
    if complete_checkpoints(run_dir):
        if source is not None and not recorded.is_file():
            raise InputError(f"{run_dir} holds a run that is not a branch of {source}; choose another --out")
        return None
    if source is None:
        if recorded.is_file():
            raise InputError(f"{run_dir} is a branch without a checkpoint of its own yet; give --branch-from again")
        return None
    return branch_point(recipe, source)


def check_extension(earlier: Recipe, recipe: Recipe, run_dir: Path) -> None:
    """InputError unless `recipe` is that of a run so far, but for more steps."""
    before, after = earlier.training.steps, recipe.training.steps
    if differing := [key for key in differing_keys(earlier, recipe) if key not in ("training.steps", *DATA_LOCATIONS)]:
        raise InputError(f"{run_dir} was started with another recipe: {', '.join(differing)} differ; --extend-to "
                         "changes training.steps alone")
    if after < before:
        raise InputError(f"--extend-to is {after}, but {run_dir} has training.steps {before} already; give more")


def extension_note(earlier: Recipe, recipe: Recipe, step: int) -> str:
    """What becomes of the learning rate of a run that goes on from its checkpoint of `step` for more steps."""
    last, following = (lr_of_iteration(each.schedule, each.optimizer.lr, each.training.steps, max(step - 1, 0) + number)
                       for number, each in enumerate((earlier, recipe)))
    said = (f"{earlier.training.steps} steps become {recipe.training.steps}; the learning rate goes from {last:.3g} at "
            f"step {step} to {following:.3g}")
    if following > 1.5 * last:
        said += (f", for a schedule of {recipe.schedule.kind} has been run down once and begins again higher up; a "
                 "branch from before (--branch-from) has one course")
    return said


def record_branch(run_dir: Path, checkpoint: Path) -> None:
    """Write down where a branch comes from."""
    origin = {"run": checkpoint.parent.parent.name, "checkpoint": checkpoint.name}
    write_atomically(run_dir / BRANCH_FILE, (json.dumps(origin) + "\n").encode())
