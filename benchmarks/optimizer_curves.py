"""What the optimizers make of the same steps on photographs: a table of validation PSNR and of the loss over steps.

    python benchmarks/optimizer_curves.py [--steps 300] [--seeds 1] [--out runs/curves] [key=value ...]

Trains photographs.yaml, every term of the objective, with AdamW and with Muon on the same shards, seeds and rates, by
`gigatok-ds train` in processes of their own. VGG16 and the teacher have random weights. The same command again
continues. It says how one small recipe goes, and nothing about others.
"""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path

from photographs import TRAINING_CROPS, VALIDATION_CROPS, Run, processor, train

from gigatok_ds.demo.pipeline import announce
from gigatok_ds.errors import InputError
from gigatok_ds.monitoring.metrics import read_metrics

OPTIMIZERS = {"AdamW": ["optimizer.kind=adamw"], "Muon": ["optimizer.kind=muon"]}
ROWS = 6
# Terms that every step has, where the recipe has them: their sums can be compared from the first to the last.
ALWAYS = ("loss/reconstruction", "loss/perceptual", "loss/semantic", "loss/commitment", "loss/codebook")


def curve(folder: Path, steps: int) -> dict[int, tuple[float, float]]:
    """Of each of `ROWS` parts of the run: mean of the sum of `ALWAYS`, and the PSNR of the validation that ends it."""
    metrics = read_metrics(folder)
    sums = {line["step"]: sum(line[name] for name in ALWAYS if name in line) for line in metrics if "loss" in line}
    psnr = {line["step"]: line["validation/psnr"] for line in metrics if "validation/psnr" in line}
    every = steps // ROWS
    return {stop: (sum(sums[step] for step in range(stop - every + 1, stop + 1)) / every, psnr[stop])
            for stop in range(every, steps + 1, every)}


def table(curves: dict[str, list[dict[int, tuple[float, float]]]]) -> str:
    """A row for each part of the runs; with several seeds the mean, and the spread from lowest to highest."""
    names = list(curves)
    lines = [f"| steps | {' | '.join(f'{name}: loss | PSNR, dB' for name in names)} |",
             "| --- " * (1 + 2 * len(names)) + "|"]
    for stop in next(iter(curves.values()))[0]:
        cells = [said([run[stop][which] for run in curves[name]], digits)
                 for name in names for which, digits in ((0, 4), (1, 2))]
        lines.append(f"| {stop} | {' | '.join(cells)} |")
    return "\n".join(lines)


def said(values: list[float], digits: int) -> str:
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help=f"a multiple of {ROWS} (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each optimizer (default: %(default)s)")
    parser.add_argument("--crops", type=int, default=TRAINING_CROPS, help="of each photograph (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/curves"), help="where data and runs go")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe settings")
    options = parser.parse_args()
    if options.steps < ROWS or options.steps % ROWS or options.seeds < 1:
        raise InputError(f"--steps is {options.steps} and --seeds {options.seeds}; they must be a multiple of {ROWS}, "
                         "and at least 1")
    curves: dict[str, list[dict[int, tuple[float, float]]]] = {name: [] for name in OPTIMIZERS}
    for seed in range(options.seeds):
        for name, settings in OPTIMIZERS.items():
            run = Run(options.out, [*options.overrides, *settings, f"training.seed={seed}"])
            run.prepare({"train": options.crops, "validation": min(options.crops, VALIDATION_CROPS)})
            folder = options.out / f"{name.lower()}-{seed}"
            announce(f"{name}, seed {seed}: {options.steps} steps")
            train(folder, [*run.settings(options.steps), f"training.validate_every={options.steps // ROWS}"])
            curves[name].append(curve(folder, options.steps))
    print(f"python benchmarks/optimizer_curves.py {' '.join(sys.argv[1:])}".rstrip())
    print(f"{processor()}, {date.today().isoformat()}; loss: the sum of what the recipe has of "
          f"{', '.join(name.removeprefix('loss/') for name in ALWAYS)}, a mean over the steps since the row before\n")
    print(table(curves))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"optimizer_curves.py: error: {error}", file=sys.stderr)
        sys.exit(2)
