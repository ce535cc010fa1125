"""Half an hour of tokenizer training on real photographs, with every term of the loss: does each go where it should?

    python benchmarks/photographs.py [--minutes 30 | --steps N] [--out runs/photographs] [--docs docs] [key=value ...]

Cuts crops of the photographs that scikit-image, scikit-learn and matplotlib ship, writes shards of them, and runs
`gigatok-ds train` on photographs.yaml, a shrunk recipe with all of the published recipe's terms. VGG16 and the teacher
have random weights: what is shown is that the training works, not how good a tokenizer becomes. With --minutes the
number of steps comes from a short run of the same recipe, and the phases keep their places as fractions of it.

Writes photographs.md, photographs.png (a panel for each term) and photographs-reconstructions.png into --docs. The same
command again continues, or only writes these anew. Exit code 1: a term did not go where it should.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from photograph_crops import CREDIT, HELD_OUT, PHOTOGRAPHS, SIZE, crops
from photograph_report import Verdict, draw, judge, phases_of, table, terms_of

from gigatok_ds.checkpoint.run_directory import RECIPE_FILE
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.recipe import TokenizerRecipe
from gigatok_ds.demo.figures import reconstruction_grid
from gigatok_ds.demo.pipeline import announce
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.image_metrics import psnr
from gigatok_ds.monitoring.metrics import read_metrics
from gigatok_ds.packing.shard_writer import write_shards
from gigatok_ds.training.environment import ENVIRONMENT_FILE

RECIPE = Path(__file__).with_suffix(".yaml")
DOCS = Path(__file__).parent.parent / "docs"
TRAINING_CROPS, VALIDATION_CROPS = 280, 16  # of each photograph
TRIAL_STEPS = 40
COMPILING = 4  # first steps of a process, which are slower than the others
VALIDATIONS = 20


class Run:
    """The benchmark's files below `out`, and its training; `overrides` change the recipe."""

    def __init__(self, out: Path, overrides: list[str]):
        self.out, self.overrides, self.started = out, overrides, time.monotonic()
        self.folder = out / "run"

    def prepare(self, counts: dict[str, int]) -> None:
        """Shards with counts[split] crops of each photograph, unless they are there."""
        for split, count in counts.items():
            folder = self.out / "data" / split
            if not folder.exists():
                announce(f"cutting {count * len(PHOTOGRAPHS)} crops for {split}")
                write_shards(crops(split, count, seed=0), folder, prefix="photographs", classes=list(PHOTOGRAPHS))

    def settings(self, steps: int) -> list[str]:
        """Overrides that make the recipe `steps` long, each phase in its place as a fraction of them."""
        recipe = load_recipe(RECIPE, self.overrides)
        loss, before = recipe.loss, recipe.training.steps
        counted = {"schedule.warmup_steps": recipe.schedule.warmup_steps,
                   "loss.quantizer.entropy_end_step": loss.quantizer.entropy_end_step,
                   "loss.auxiliary.end_step": loss.auxiliary and loss.auxiliary.end_step,
                   "loss.adversarial.start_step": loss.adversarial and loss.adversarial.start_step}
        data = [f"data.{split}={json.dumps(str(self.out / 'data' / split))}" for split in ("train", "validation")]
        return [*self.overrides, *data, f"training.steps={steps}", "training.log_every=1",
                f"training.validate_every={max(1, steps // VALIDATIONS)}",
                f"checkpoint.every={max(1, steps // 4)}",
                *(f"{key}={round(step * steps / before)}" for key, step in counted.items() if step)]

    def steps(self, minutes: float) -> int:
        """The steps of the run that is there, or as many as fit into what is left of `minutes` after a short trial."""
        earlier = self.folder / RECIPE_FILE
        if earlier.is_file():
            return load_recipe(earlier).training.steps
        announce(f"{TRIAL_STEPS} steps, to see how many there are in {minutes:g} minutes")
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            started = time.monotonic()
            train(Path(folder), [*self.settings(TRIAL_STEPS), f"training.validate_every={TRIAL_STEPS}"])
            seconds = time.monotonic() - started
            metrics = read_metrics(folder)
        trained = [line["time"] for line in metrics if "loss" in line]
        validated = max(line["time"] for line in metrics if "validation/psnr" in line)
        per_step = (trained[-1] - trained[COMPILING - 1]) / (TRIAL_STEPS - COMPILING)
        besides = seconds - (validated - trained[COMPILING - 1]) + VALIDATIONS * (validated - trained[-1])
        left = 60 * minutes - (time.monotonic() - self.started) - besides
        return max(TRIAL_STEPS, int(left / per_step))


def train(folder: Path, settings: list[str]) -> None:
    """`gigatok-ds train` in a process of its own. Raises InputError when it fails."""
    command = [sys.executable, "-m", "gigatok_ds", "train", str(RECIPE), "--out", str(folder), *settings]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise InputError(f"training failed (exit code {code}); its own message is above")


def write_report(folder: Path, docs: Path, command: str) -> list[Verdict]:
    """The pictures and photographs.md about the finished run in `folder`."""
    recipe, metrics = load_recipe(folder / RECIPE_FILE), read_metrics(folder)
    verdicts = [judge(term, metrics, recipe) for term in terms_of(recipe)]
    docs.mkdir(parents=True, exist_ok=True)
    draw(docs / "photographs.png", verdicts, phases_of(recipe), recipe.training.steps)
    with np.load(folder / "probe.npz") as probe:
        images, made = (torch.from_numpy(probe[name]) for name in ("images", "reconstruction"))
    reconstruction_grid(docs / "photographs-reconstructions.png", images, made, psnr(images, made).tolist())
    environment = json.loads((folder / ENVIRONMENT_FILE).read_text())
    seconds = metrics[-1]["time"] - metrics[0]["time"]
    scratch = docs / ".photographs.md.partial"
    scratch.write_text(page(recipe, verdicts, environment, seconds, command), encoding="utf-8")
    os.replace(scratch, docs / "photographs.md")
    return verdicts


def page(recipe: TokenizerRecipe, verdicts: list[Verdict], environment: dict, seconds: float, command: str) -> str:
    model, training, packages = recipe.model, recipe.training, environment["packages"]
    pace = f"{seconds / 60:.1f} minutes, {seconds / training.steps:.2f} seconds a step"
    shape = f"{model.image_size} px, {model.latent_tokens} codes of a codebook of {model.quantizer.codebook_size}"
    missed = [verdict.term.key for verdict in verdicts if verdict.failure]
    changed = " with changes" if environment["git_modified"] else ""
    phases = "\n".join(f"- {name}: step {step}" for name, step in phases_of(recipe).items())
    return f"""# {training.steps} steps on photographs

Written by `{command}`, {environment["time"][:10]}, commit {environment["git_commit"] or "unknown"}{changed}.
{processor()}, {len(os.sched_getaffinity(0))} cores; torch {torch.__version__}, deepspeed {packages["deepspeed"]},
timm {packages["timm"]}, python {environment["python"]}. The training took {pace} with its validations.

**{f"Not as it should be: {', '.join(missed)}." if missed else "Every term went where it should."}**

Trained was `benchmarks/photographs.yaml`: {shape}, batch {training.global_batch_size},
{training.precision}. {random_networks(recipe)}

The data: crops of {SIZE} px, at random scales, of {len(PHOTOGRAPHS)} photographs that packages ship; the right
{HELD_OUT:.0%} of each is seen by validation only. {CREDIT}

## Where each term went

Values are as logged, with their weights. "first" is the first step's, the others are means over a twentieth of the run:
after as many steps as the learning rate warms up, at the end of the term's steps, and where that mean was highest.

{table(verdicts)}

{phases}

![each term over the steps](photographs.png)

## Validation images

Originals above, reconstructions below.

![reconstructions](photographs-reconstructions.png)
"""


def random_networks(recipe: TokenizerRecipe) -> str:
    """Which frozen networks had random weights, and what follows from that."""
    frozen = {"VGG16 of the perceptual term": recipe.loss.perceptual,
              f"the teacher {recipe.loss.semantic and recipe.loss.semantic.teacher}": recipe.loss.semantic}
    names = [name for name, config in frozen.items() if config and config.weights == "random"]
    if not names:
        return "No frozen network had random weights."
    return (f"Random weights: {' and '.join(names)}.\nSo these figures say that the terms are trained as they "
            "should be, and nothing about what a tokenizer gains from them.")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=30, help="how long all of it may take, about (default: 30)")
    length.add_argument("--steps", type=int, help="train so many steps, however long that takes")
    parser.add_argument("--crops", type=int, default=TRAINING_CROPS, help="of each photograph (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/photographs"),
                        help="where data and run go (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the report goes (default: docs)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe settings")
    options = parser.parse_args()
    said = f"--steps {options.steps}" if options.steps else f"--minutes {options.minutes:g}"
    command = " ".join(["python benchmarks/photographs.py", said, *map(shlex.quote, options.overrides)])
    run = Run(options.out, options.overrides)
    run.prepare({"train": options.crops, "validation": min(options.crops, VALIDATION_CROPS)})
    steps = options.steps or run.steps(options.minutes)
    announce(f"training for {steps} steps")
    train(run.folder, run.settings(steps))
    verdicts = write_report(run.folder, options.docs, command)
    print(table(verdicts))
    return 1 if any(verdict.failure for verdict in verdicts) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"photographs.py: error: {error}", file=sys.stderr)
        sys.exit(2)
