"""Compute steps of a training run once more, and compare: losses, gradient norms and, at checkpoints, every tensor.

  gigatok-ds replay runs/ss --steps 10000:15000           from the checkpoint of step 10,000 to the end of step 15,000
  torchrun --nproc-per-node 4 -m gigatok_ds replay runs/gpt --steps 5000:5200 parallel.tensor=2

Draws, data and checkpoints do not depend on the layout of ranks, so one process can repeat what hundreds have done;
more of them if its memory is too small. Both agree to rounding, on the run's own layout usually to the last bit. What
differs beyond that, through a GPU that computes wrongly, say, or memory whose bits flip, is named: the first step, and
the tensor, its element and the rank that held it. Exit code 0 when all is equal, 1 when something differs.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gigatok_ds.replay.comparison import Compared

HELP = "compute steps of a run once more, and name what differs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="another layout (parallel.tensor, training.micro_batch_size), or where the data lie now")
    parser.add_argument("--steps", required=True, metavar="A:B",
                        help="from the checkpoint of step A to the end of step B; tensors are compared at each "
                             "checkpoint that the run has of a step after A")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="keep what is computed here, as a run directory (default: it is removed)")
    parser.add_argument("--tolerance", type=float, metavar="X",
                        help="differences that count, relative to a tensor's largest value (default: 1e-4, in half "
                             "precision 5e-2)")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.cluster.launched import launched_rank
    from gigatok_ds.errors import InputError
    from gigatok_ds.parallel.cuda_queues import order_kernels
    from gigatok_ds.replay.again import Steps, check_replay, recipe_of_replay, replay
    from gigatok_ds.replay.comparison import TOLERANCES, compare

    if args.tolerance is not None and not 0 < args.tolerance < 1:
        raise InputError(f"--tolerance is {args.tolerance}; it must be between 0 and 1")
    steps, rank, run_dir = Steps.parsed(args.steps), launched_rank(), args.run_directory
    out = args.out or run_dir / f"replay-{steps.first}-{steps.last}"
    state = check_replay(run_dir, steps, out)
    recipe = recipe_of_replay(run_dir, steps, args.overrides, rank.world_size)
    order_kernels(recipe.parallel.tensor)
    replay(run_dir, steps, state, recipe, out)
    if not rank.is_first:
        return 0
    tolerance = args.tolerance or TOLERANCES[recipe.training.precision]
    print(f"steps {steps.first + 1:,} to {steps.last:,} of {run_dir} (on {state.world_size} ranks) once more on "
          f"{rank.world_size}:")
    found = []
    try:
        for what, compared in compare(run_dir, out, steps, recipe, tolerance):
            print("\n".join(_lines(what, compared)), flush=True)
            found.append(compared)
    finally:
        if args.out is None:
            shutil.rmtree(out)
    if not any(compared.figures for compared in found):
        raise InputError(f"nothing could be compared: {run_dir} has logged and saved other steps than {steps.first} to "
                         f"{steps.last}")
    return int(any(compared.differing for compared in found))


def _lines(what: str, compared: Compared):
    if not compared.figures:
        yield f"- {what}: none to compare"
    elif not compared.largest:
        yield f"- {what}: {compared.figures:,}, equal to the last bit"
    elif not compared.differing:
        yield (f"- {what}: {compared.figures:,}, equal but for rounding ({compared.inexact:,} of them; at most "
               f"{compared.largest:.1%} of what is allowed)")
    else:
        first = compared.differing[0]
        yield f"- {what}: DIFFERENT, {len(compared.differing):,} beyond what is allowed"
        yield f"  step {first.step:,}: {first.what} ({first.times:.3g} times what is allowed)"
