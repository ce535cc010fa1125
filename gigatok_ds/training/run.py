"""A training run from a recipe: prepare the run directory, build the task, train; `run_checks` comes first."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gigatok_ds.checkpoint.class_names import ClassNames, classes_of_run, record_classes
from gigatok_ds.checkpoint.run_directory import RECIPE_FILE, complete_checkpoints
from gigatok_ds.config.deepspeed import check_settings, resolve_deepspeed, zero3_worth_it
from gigatok_ds.config.load import load_recipe, save_resolved
from gigatok_ds.config.location import masked
from gigatok_ds.config.model import ENCODING_PARTS
from gigatok_ds.config.recipe import GPTRecipe, Recipe, TokenizerRecipe
from gigatok_ds.files import write_atomically
from gigatok_ds.ownership import is_ours, owned_by_first
from gigatok_ds.parallel.cuda_queues import order_kernels
from gigatok_ds.training.branch import extension_note, record_branch
from gigatok_ds.training.run_checks import check_run

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from gigatok_ds.parallel.topology import Topology
    from gigatok_ds.resilience.fault_injection import Fault
    from gigatok_ds.training.loop import Task

DEEPSPEED_FILE = "deepspeed.json"


def run_training(recipe: Recipe, run_dir: Path, deepspeed: str | dict, branch_from: Path | None = None,
                 faults: Sequence[Fault] = (), *, extend: bool = False, until: int | None = None) -> None:
    """Train `recipe` in this process (one rank of however many were launched), into `run_dir`.

    deepspeed is the path of a DeepSpeed JSON or a dictionary of its settings. Resumes by itself when the directory
    holds a checkpoint; branch_from is a run or checkpoint to start from otherwise. extend: the recipe may have more
    steps than the run was begun with. until: the step to end at, if not the recipe's last. `faults` happen on purpose
    (resilience.fault_injection). Raises InputError for anything the user can mend, and when another job trains into
    `run_dir`.
    """
    from gigatok_ds.engine.deepspeed_schema import check_with_deepspeed
    from gigatok_ds.monitoring.history import record_event
    from gigatok_ds.parallel.timeouts import collective_timeout, outlast_watchdog
    from gigatok_ds.parallel.topology import start_process_group, stop_process_group
    from gigatok_ds.resilience.preemption import leaving_at_once
    from gigatok_ds.resilience.rank_monitor import watch_ranks
    from gigatok_ds.training.loop import train

    begun = threading.Event()

    def record_if_ours(event: str, reason: str) -> None:
        if begun.is_set() and is_ours(run_dir):  # another's is left alone
            record_event(run_dir, event, reason=reason)

    with leaving_at_once(lambda name: record_if_ours("stopped", name)):
        order_kernels(recipe.parallel.tensor)
        branch = check_run(recipe, run_dir, branch_from, extend=extend)
        check_with_deepspeed(*check_settings(deepspeed, recipe))
        topology = start_process_group(tensor_size=recipe.parallel.tensor, sequence_parallel=recipe.parallel.sequence,
                                       timeout=collective_timeout(recipe.monitor.stall_seconds))
        try:
            with ExitStack() as held, watch_ranks(topology,
                                                  lambda text: record_if_ours("failed", failure_reason(text))) as end:
                settings, warnings = resolve_deepspeed(deepspeed, recipe, data_parallel_size=topology.data_size)
                held.enter_context(owned_by_first(run_dir, topology))
                classes = classes_of_run(run_dir, topology, _run_of(branch))
                identity, build = open_task(recipe, topology, settings, classes)
                _begin(recipe, run_dir, settings, warnings, branch, topology, identity)
                begun.set()
                task = build()
                outlast_watchdog(recipe.monitor.stall_seconds)
                if faults:
                    from gigatok_ds.resilience.fault_injection import inject

                    task = inject(task, faults, run_dir, topology)
                record_classes(task.class_names, run_dir, topology)
                train(recipe, task, run_dir, topology, settings, end, branch, until=until)
                if topology.is_first:
                    record_event(run_dir, "finished", step=until or recipe.training.steps)
        finally:
            stop_process_group(topology)


def _begin(recipe: Recipe, run_dir: Path, settings: dict, warnings: list[str], branch: Path | None, topology: Topology,
           identity: dict[str, str]) -> None:
    """Write down what is about to be run, unless it is of other data than before: then nothing. Collective."""
    from gigatok_ds.engine.compilation import left_eager
    from gigatok_ds.monitoring.history import record_event
    from gigatok_ds.training.data_record import check_identity, write_identity

    check_identity(identity, run_dir, topology, since=_run_of(branch))
    if topology.is_first:
        _prepare(recipe, run_dir, settings, warnings + left_eager(recipe, topology.device, settings), branch)
        write_identity(identity, run_dir)
        record_event(run_dir, "started", ranks=topology.world_size, command=list(map(masked, sys.argv)),
                     accumulation=settings["gradient_accumulation_steps"])
    topology.barrier()


def failure_reason(text: str) -> str:
    """The cause in a report, in one line: a traceback's exception with all of its message, or a single line itself."""
    lines = text.strip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    after = (line for line in lines[frames[-1] + 1:] if line and not line.startswith("    ")) if frames else lines
    return " ".join(" ".join(after).split())[:1000]


def _prepare(recipe: Recipe, run_dir: Path, settings: dict, warnings: list[str], branch: Path | None) -> None:
    """Say what is odd about the settings, and write down what is about to be run."""
    from gigatok_ds.checkpoint.original import build_on_meta
    from gigatok_ds.monitoring.history import record_event
    from gigatok_ds.precision import device_has_bf16, precision_note
    from gigatok_ds.training.environment import write_environment
    from gigatok_ds.training.frozen_weights import random_weight_warnings, record_frozen

    parameters = sum(parameter.numel() for parameter in build_on_meta(recipe.model).parameters())
    advice = zero3_worth_it(parameters) if settings["zero_optimization"]["stage"] == 3 else None
    for warning in [*warnings, *([advice] if advice else []), *random_weight_warnings(recipe)]:
        logger.warning("%s", warning)
    if note := freezing_note(recipe):
        logger.info("note: %s", note)
    if note := precision_note(recipe.training.precision, device_has_bf16()):
        logger.info("note: %s", note)
    run_dir.mkdir(parents=True, exist_ok=True)
    if (run_dir / RECIPE_FILE).is_file():
        earlier = load_recipe(str(run_dir / RECIPE_FILE))
        if earlier.training.steps != recipe.training.steps:
            newest = max((step for step, _ in complete_checkpoints(run_dir)), default=0)
            logger.warning("%s: %s", run_dir, extension_note(earlier, recipe, newest))
            record_event(run_dir, "extended", steps=earlier.training.steps, to=recipe.training.steps)
    record_frozen(recipe, run_dir, since=_run_of(branch) or run_dir)
    if branch:
        record_branch(run_dir, branch)
    save_resolved(recipe, run_dir / RECIPE_FILE)
    write_atomically(run_dir / DEEPSPEED_FILE, (json.dumps(settings, indent=2) + "\n").encode())
    write_environment(run_dir, command=sys.argv)


def freezing_note(recipe: Recipe) -> str | None:
    """What becomes of a tokenizer's codes where some of what makes them is frozen."""
    frozen = [part for part in ENCODING_PARTS if part in recipe.training.freeze]
    if not frozen or isinstance(recipe, GPTRecipe):
        return None
    trained = [part for part in ENCODING_PARTS if part not in frozen]
    if not trained:
        return "all that codes depend on is frozen, so they stay what they are, and GPTs trained on them stay valid"
    return (f"codes change, though training.freeze has {', '.join(frozen)}: they also depend on {', '.join(trained)}, "
            "which is trained")


def _run_of(branch: Path | None) -> Path | None:
    """The run whose checkpoint a branch starts from."""
    return branch.parent.parent if branch else None


def open_task(recipe: Recipe, topology: Topology, settings: dict,
              classes: ClassNames = ClassNames()) -> tuple[dict[str, str], Callable[[], Task]]:
    """The recipe's data, opened: what tells them from any other, and what makes the task of them."""
    if isinstance(recipe, TokenizerRecipe):
        from gigatok_ds.training.tokenizer_task import TokenizerTask

        images = TokenizerTask.open_data(recipe, topology, settings, classes)
        return images.identity(), partial(TokenizerTask, recipe, topology, settings, images)
    from gigatok_ds.training.gpt_task import GPTTask

    source = GPTTask.open_data(recipe, topology, settings, classes)
    return source.identity(), partial(GPTTask, recipe, topology, settings, source)
