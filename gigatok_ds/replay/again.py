"""Steps of a run computed once more, from one of its checkpoints, by ranks of any number."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gigatok_ds.checkpoint.class_names import CLASSES_FILE
from gigatok_ds.checkpoint.run_directory import (
    DATA_FILE,
    RECIPE_FILE,
    STATE_FILE,
    State,
    checkpoint_path,
    complete_checkpoints,
    damaged_file,
    read_state,
)
from gigatok_ds.cluster.launched import launched_rank
from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.recipe import Recipe, TokenizerRecipe
from gigatok_ds.errors import InputError
from gigatok_ds.files import directory_beside, sha256
from gigatok_ds.monitoring.history import read_history, saved_step
from gigatok_ds.monitoring.metrics import read_metrics
from gigatok_ds.training.frozen_weights import FROZEN_FILE
from gigatok_ds.training.run import DEEPSPEED_FILE, run_training
from gigatok_ds.training.run_checks import check_run
from gigatok_ds.untrusted import read_json

# Of DeepSpeed's settings, those that decide about numbers.
_NUMERIC = ("fp16", "data_types", "communication_data_type")
_ALLOWED = ("parallel.", "monitor.", "data.train=", "data.second=", "data.validation=", "data.tokenizer=",
            "data.workers=", "data.cache", "data.patience=", "training.micro_batch_size=", "training.compile=",
            "loss.perceptual.weights=", "loss.semantic.weights=", "loss.adversarial.backbone_weights=")
REPLAY_FILE = "replay.json"  # in a replay's directory: of which run and steps it is
_COPIED_SECONDS = 1800.0  # for the first rank, to copy a checkpoint
_BARE = ["checkpoint.keep_best=0", "checkpoint.best_metric=null", f"checkpoint.keep={10**6}",
         "checkpoint.asynchronous=false", "monitor.wandb_project=null"]


class Steps(NamedTuple):
    """From the checkpoint of step `first` to the end of step `last`."""

    first: int
    last: int

    @classmethod
    def parsed(cls, text: str) -> Steps:
        """Of "A:B". Raises InputError for anything else."""
        first, colon, last = text.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise InputError(f"--steps is {text}; it must be A:B, from the checkpoint of step A to a later step B")
        return cls(int(first), int(last))


def check_replay(run_dir: Path, steps: Steps, out: Path) -> State:
    """The state of the checkpoint that a replay starts from.

    Raises InputError when there is none, when it or a later one of these steps is damaged, when the run has written
    nothing down to compare with, and for an `out` that is not an unfinished replay of the same.
    """
    if not (run_dir / RECIPE_FILE).is_file():
        raise InputError(f"{run_dir} is not a training run: it has no {RECIPE_FILE}")
    held = dict(complete_checkpoints(run_dir))
    if steps.first not in held:
        raise InputError(f"--steps begins at {steps.first}, of which {run_dir} holds no complete checkpoint; there are "
                         f"{', '.join(map(str, held)) or 'none'}")
    within = [step for step in held if steps.first <= step <= steps.last]
    rank = launched_rank()  # each looks at its share, and one that finds something ends them all
    for step in within:
        if problem := damaged_file(held[step], read_state(held[step]), share=rank.rank, of=rank.world_size):
            raise InputError(problem)
    logged = any("loss" in line and steps.first < line["step"] <= steps.last for line in read_metrics(run_dir))
    if not logged and len(within) == 1:
        raise InputError(f"{run_dir} has logged nothing and holds no checkpoint between the steps {steps.first} and "
                         f"{steps.last}, so there is nothing to compare with; choose other --steps")
    if out.exists():
        _check_begun(run_dir, steps, out)
    return read_state(held[steps.first])


def _check_begun(run_dir: Path, steps: Steps, out: Path) -> None:
    if not (out / REPLAY_FILE).is_file() or read_json(out / REPLAY_FILE) != _origin(run_dir, steps):
        raise InputError(f"{out} exists, and is no replay of these steps; choose another --out")
    if any(step >= steps.last for step, _ in complete_checkpoints(out)):
        raise InputError(f"{out} holds a finished replay; remove it, or choose another --out")


def _origin(run_dir: Path, steps: Steps) -> dict[str, Any]:
    return {"run": run_dir.resolve().name, "steps": list(steps),
            "checkpoint": sha256(checkpoint_path(run_dir, steps.first) / STATE_FILE)}


def recipe_of_replay(run_dir: Path, steps: Steps, overrides: Sequence[str], ranks: int) -> Recipe:
    """The run's recipe on one tensor rank, unless overrides say otherwise, for so many ranks.

    A micro batch of the replay has as many samples as one of all data ranks of the run together. Raises InputError for
    a setting that would train something else.
    """
    path = str(run_dir / RECIPE_FILE)
    for text in overrides:
        if not text.startswith(_ALLOWED):
            raise InputError(f"{text.partition('=')[0]} would make another run of it; a replay may differ in its "
                             "layout (parallel.*, training.micro_batch_size) and in where data and weights lie")
    ran = load_recipe(path)
    alone = ["parallel.tensor=1", "parallel.sequence=false"]
    asked = load_recipe(path, [*alone, *overrides])
    if steps.last > ran.training.steps:
        raise InputError(f"--steps ends at {steps.last}, but the run has training.steps {ran.training.steps}")
    settings = [*_BARE, f"training.log_every={ran.training.log_every}", f"training.validate_every={ran.training.steps}"]
    if isinstance(ran, TokenizerRecipe):
        settings += ["validation.fid_every=null", "validation.inception=null", "monitor.preview_images=0"]
    if not any(text.startswith("training.micro_batch_size=") for text in overrides):
        per_step = ran.training.global_batch_size // _accumulation(run_dir, steps)
        data_ranks = max(ranks // asked.parallel.tensor, 1)
        settings.append(f"training.micro_batch_size={max(per_step // data_ranks, 1)}")
    return load_recipe(path, [*alone, *overrides, *settings])


def replay(run_dir: Path, steps: Steps, state: State, recipe: Recipe, out: Path) -> None:
    """Train `recipe` over those steps into `out`, a run directory that begins with the run's checkpoint.

    On every rank. What was begun goes on.
    """
    checkpoint = checkpoint_path(run_dir, steps.first)
    ran = _settings(run_dir)
    numeric = {key: ran[key] for key in _NUMERIC if key in ran}
    settings = zero_settings(state.stage) | numeric
    if launched_rank().is_first and not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with directory_beside(out) as scratch:
            shutil.copytree(checkpoint, checkpoint_path(scratch, steps.first), copy_function=_linked)
            for name in (CLASSES_FILE, DATA_FILE, FROZEN_FILE):
                if (run_dir / name).is_file():
                    shutil.copyfile(run_dir / name, scratch / name)
            (scratch / REPLAY_FILE).write_text(json.dumps(_origin(run_dir, steps)), encoding="utf-8")
    deadline = time.monotonic() + _COPIED_SECONDS
    while not (out / REPLAY_FILE).is_file():  # it appears with all the rest
        if time.monotonic() > deadline:
            raise InputError(f"{out}, which the first rank writes, is not to be seen here")
        time.sleep(0.2)
    check_run(recipe, out)
    run_training(recipe, out, settings, until=steps.last)


def _linked(source: str, target: str) -> None:
    """Another name of the file, or a copy where there cannot be one: checkpoints are never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _settings(run_dir: Path) -> dict[str, Any]:
    path = run_dir / DEEPSPEED_FILE
    if not path.is_file():
        raise InputError(f"{run_dir} has no {DEEPSPEED_FILE}, so how its batches were cut is not known")
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: {json.dumps(found)[:60]} is no object of settings")
    return found


def _accumulation(run_dir: Path, steps: Steps) -> int:
    """Micro batches of a step when the first checkpoint after `steps.first` was made; InputError when nothing says so.
    """
    started: dict[str, Any] = {}
    for line in read_history(run_dir):
        if line["event"] == "started":
            started = line
        elif (saved_step(line) or 0) > steps.first:
            break
    found = started.get("accumulation", _settings(run_dir).get("gradient_accumulation_steps"))
    if type(found) is not int or found < 1:
        raise InputError(f"{run_dir / DEEPSPEED_FILE} is damaged: gradient_accumulation_steps is {found!r}")
    return found
