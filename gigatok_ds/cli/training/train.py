"""Train a tokenizer or a GPT from a recipe.

Run it plainly for one process, or on every rank through a launcher:

  gigatok-ds train demo_tokenizer --out runs/tok data.train=shards/train data.validation=shards/test
  deepspeed --num_gpus 8 --no_local_rank --module gigatok_ds train VQ_SS256 --out runs/ss --zero 3 data.train=...

The run resumes by itself when the output directory already holds a checkpoint. One run with a constant learning rate
serves several cool-downs, each a run of its own:

  gigatok-ds train GPT-B --out runs/gpt-cool-300k --branch-from runs/gpt training.steps=300000 data.train=...

A run that is to go on for longer than it was begun for says what becomes of its learning rate:

  gigatok-ds train runs/gpt/recipe.yaml --out runs/gpt --extend-to 400000
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from gigatok_ds.cluster.launched import launched_rank
from gigatok_ds.errors import InputError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from gigatok_ds.config.recipe import Recipe

HELP = "train a tokenizer or a GPT from a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="name of a recipe (see: gigatok-ds recipes) or path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe settings, e.g. optimizer.lr=2e-4")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run directory; resumed if it exists")
    parser.add_argument("--branch-from", type=Path, metavar="RUN",
                        help="start from the newest checkpoint of another run's constant learning rate, or from the "
                             "checkpoint of it that is given (RUN/checkpoints/step-N), for instance to cool down over "
                             "training.steps")
    parser.add_argument("--extend-to", type=int, metavar="STEPS",
                        help="go on with the run in --out until this step, more than its training.steps so far")
    engine = parser.add_mutually_exclusive_group()
    engine.add_argument("--zero", type=int, choices=range(4), default=1, help="ZeRO stage (default: 1)")
    parser.add_argument("--tp", type=int, metavar="N",
                        help="tensor-parallel ranks, within a host; the same as parallel.tensor=N (default: 1)")
    parser.add_argument(
        "--inject",
        action="append",
        default=[],
        metavar="FAULT",
        help="for drills: a fault such as kill:rank=2,step=7 or nan:rank=0,after=60 (seconds); may be given "
        "several times (kinds: docs/reliability.md)",
    )
    engine.add_argument("--deepspeed", metavar="JSON", help="DeepSpeed settings file instead, e.g. "
                                                            "ds_configs/zero3.json")
    engine.add_argument(
        "--auto",
        action="store_true",
        help="the layout that gigatok-ds plan recommends for the GPUs of this job: ZeRO stage, tensor ranks, "
        "micro batch, recomputation",
    )


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.config.deepspeed import zero_settings
    from gigatok_ds.config.load import load_recipe
    from gigatok_ds.parallel.cuda_queues import order_kernels
    from gigatok_ds.training.run import run_training
    from gigatok_ds.training.run_checks import check_run

    faults = []
    if args.inject:
        from gigatok_ds.resilience.fault_injection import parse_fault

        faults = [parse_fault(text) for text in args.inject]
    tensor = [] if args.tp is None else [f"parallel.tensor={args.tp}"]
    extended = [] if args.extend_to is None else [f"training.steps={args.extend_to}"]
    recipe, stage = load_recipe(args.recipe, [*args.overrides, *tensor, *extended]), args.zero
    if args.auto:
        recipe, stage = _recommended(recipe, [*args.overrides, *tensor])
    order_kernels(recipe.parallel.tensor)
    check_run(recipe, args.out, args.branch_from, extend=bool(extended))
    run_training(recipe, args.out, args.deepspeed or zero_settings(stage), args.branch_from, faults,
                 extend=bool(extended))
    return 0


def _recommended(recipe: Recipe, overrides: list[str]) -> tuple[Recipe, int]:
    """The recipe in the layout that the planner recommends here, and the ZeRO stage."""
    from gigatok_ds.planning.auto import plan_here

    decided = [text for text in overrides if text.startswith(("parallel.", "training.micro_batch_size="))]
    if decided:
        raise InputError(f"{decided[0]} and --auto both say how to train; leave one of them out")
    plan = plan_here(recipe)
    if launched_rank().is_first:
        logger.info("--auto: %s (%.1f of %.1f GB at most, by estimate)", " ".join(plan.layout.arguments(recipe)),
                    plan.memory.peak / 1e9, plan.usable / 1e9)
    return plan.layout.applied_to(recipe), plan.layout.stage
