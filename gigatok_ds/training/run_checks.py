"""What can be refused before any rank starts, a check for each; none knows of the others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from gigatok_ds.checkpoint.run_directory import RECIPE_FILE, complete_checkpoints
from gigatok_ds.config.load import DATA_LOCATIONS, differing_keys, load_recipe
from gigatok_ds.config.location import is_masked
from gigatok_ds.config.recipe import GPTRecipe, Recipe
from gigatok_ds.config.sources import locations_of
from gigatok_ds.errors import InputError
from gigatok_ds.monitoring.wandb_log import check_wandb
from gigatok_ds.training.branch import OWN_KEYS, check_branch, check_extension


def check_run(recipe: Recipe, run_dir: Path, branch_from: Path | None = None, *, extend: bool = False) -> Path | None:
    """Refuse missing data, weights or packages, settings that cannot be meant, and another recipe's directory.

    Downloads the weights of frozen networks that the recipe wants downloaded. Returns the checkpoint of another run
    that this one continues from, if it does. extend: the recipe may have more steps than the run was begun with. Raises
    InputError, of the first check that finds something.
    """
    for check in CHECKS:
        check(recipe, run_dir)
    check_directory(recipe, run_dir, extend=extend)
    branch = check_branch(recipe, run_dir, branch_from)
    check_start(recipe, run_dir, branch)
    return branch


def check_start(recipe: Recipe, run_dir: Path, branch: Path | None) -> None:
    """Refuse adapters without weights that they adapt: random ones stay random."""
    if recipe.training.lora and branch is None and not complete_checkpoints(run_dir):
        raise InputError(f"training.lora tunes a trained GPT, but {run_dir} holds no weights to start from; write them "
                         f"there with gigatok-ds convert GPT {run_dir} --to training --recipe ... training.lora=...")


def check_tracker(recipe: Recipe, run_dir: Path) -> None:
    check_wandb(recipe.monitor.wandb_project)


def check_schedule(recipe: Recipe, run_dir: Path) -> None:
    warmup, steps = recipe.schedule.warmup_steps, recipe.training.steps
    if warmup > steps:
        raise InputError(f"schedule.warmup_steps is {warmup}, but training.steps is {steps}: the learning rate would "
                         "never be reached; make the warm-up shorter, or the run longer")


def check_places(recipe: Recipe, run_dir: Path) -> None:
    """Refuse paths that no file of a run can name, and TensorBoard cannot write to: bytes that are no text."""
    for name, place in (("--out", run_dir), *(("data.train", place) for place in locations_of(recipe.data.train)),
                        *(("data.validation", place) for place in locations_of(recipe.data.validation))):
        try:
            str(place).encode()
        except UnicodeEncodeError:
            raise InputError(f"{name} is {place}, whose bytes are no text as this shell has it "
                             f"({sys.getfilesystemencoding()}); choose another name, or set LC_ALL=C.UTF-8") from None


def check_locations(recipe: Recipe, run_dir: Path) -> None:
    """Refuse data without a location, or with one whose secrets are left out."""
    for name in DATA_LOCATIONS:
        for location in filter(is_masked, locations_of(getattr(recipe.data, name.removeprefix("data."), None))):
            raise InputError(f"{name} is {location}, as a run writes it down without its secrets; give {name}=... as "
                             "when the run was begun")
    for split in ("train", "validation"):
        if getattr(recipe.data, split) is None:
            raise InputError(f"data.{split} is not set; give data.{split}=DIR, a directory of shards")


def check_shards(recipe: Recipe, run_dir: Path) -> None:
    """Refuse shards that are not there, not of this kind, or damaged beyond what the recipe allows."""
    from gigatok_ds.data.codes import CODE_EXTENSIONS
    from gigatok_ds.data.decoding import training_transform
    from gigatok_ds.shards.remote import check_data
    from gigatok_ds.shards.shard_cache import ShardCache
    from gigatok_ds.shards.tar_scan import IMAGE_EXTENSIONS

    data = recipe.data
    training_transform(1, decoding=data.decoding)
    of_codes = isinstance(recipe, GPTRecipe) and recipe.data.tokenizer is None
    for split in ("train", "validation"):
        for location in locations_of(getattr(data, split)):
            check_data(f"data.{split}", location, CODE_EXTENSIONS if of_codes else IMAGE_EXTENSIONS,
                       ShardCache.of(data.cache, data.cache_gb, data.patience),
                       max_bad_fraction=data.max_bad_fraction if split == "train" and not of_codes else 0.0)


def check_tokenizer(recipe: Recipe, run_dir: Path) -> None:
    """Refuse, for a GPT, a tokenizer or a second set of codes that are not there, or of other codes."""
    if isinstance(recipe, GPTRecipe):
        from gigatok_ds.training.code_sources import check_sources

        check_sources(recipe)


def check_directory(recipe: Recipe, run_dir: Path, *, extend: bool = False) -> None:
    """Refuse a directory in which another recipe was trained."""
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"{run_dir} exists and is not a directory")
    earlier = run_dir / RECIPE_FILE
    if not earlier.is_file():
        if extend:
            raise InputError(f"--extend-to goes on with a run, but {run_dir} holds none")
        return
    if extend:
        check_extension(load_recipe(str(earlier)), recipe, run_dir)
        return
    started = load_recipe(str(earlier))
    differing = [key for key in differing_keys(started, recipe) if key not in DATA_LOCATIONS]
    if differing:
        branch = ("" if set(differing) - set(OWN_KEYS) else
                  f", and continue there from this run's constant learning rate with --branch-from {run_dir}")
        if differing == ["training.steps"] and recipe.training.steps > started.training.steps:
            branch += f", or go on here with --extend-to {recipe.training.steps}"
        raise InputError(f"{run_dir} was started with another recipe: {', '.join(differing)} differ; "
                         f"choose another --out{branch}")


def check_frozen_networks(recipe: Recipe, run_dir: Path) -> None:
    from gigatok_ds.training.frozen_weights import check_frozen

    check_frozen(recipe)


CHECKS: tuple[Callable[[Recipe, Path], None], ...] = (
    check_tracker, check_schedule, check_places, check_locations, check_shards, check_tokenizer,
    check_frozen_networks)
