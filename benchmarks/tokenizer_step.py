"""A tokenizer's training step: ours beside the same step in plain eager torch (`plain_step.py`).

    python benchmarks/tokenizer_step.py [key=value ...] [--recipe VQ_SS256] [--batch 1] [--precision fp32]
                                        [--phase both]

Each side runs in a process of its own, from the same weights and images, frozen networks included, whose weights are
random. Ours is the real TokenizerTask in its DeepSpeed engines. Steps of the two sides alternate; each line gives the
median after a warm-up, and the peak memory of the process: on a CPU its resident set, libraries included, on a GPU what
torch held. Phases: "auxiliary" is the recipe's step 1 (with direct reconstruction and feature loss), "adversarial" its
first step with a discriminator and without these. Before anything is timed, losses and gradient norms of both sides are
compared: a benchmark of different computations proves nothing. key=value changes the recipe, `training.compile=default`
say. On a GPU the model FLOPs utilisation (MFU) is given, too.

A machine that others use at the same time gives no figure worth keeping. Exit code 1: a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import figures
import torch
from figures import Figure
from machine import processor
from torch import Tensor, nn

from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.recipe import TokenizerRecipe
from gigatok_ds.errors import InputError
from gigatok_ds.monitoring.throughput import peak_of

SIDES = ("ours", "plain")
PHASES = ("auxiliary", "adversarial")
TARGETS = {"cpu": 1.3, "cuda": 1.8}  # how many times faster ours must be
MFU_TARGET = 0.4
# Relative, of every loss and gradient norm; a loss that is a difference of larger numbers counts as at least 0.1. On a
# CPU ours convolves by Winograd's transform (cpu/convolution.py), within 5e-6 a layer: up to 2e-4 of a gradient's norm.
# At 64 pixels the plain step's gradient norm in float32 is 7.5e-4 from its own in float64, and ours 3e-5.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
SEED = 0


def resolve(options: argparse.Namespace, folder: Path) -> TokenizerRecipe:
    """The recipe as it is measured. Raises InputError for one that the plain step does not know."""
    from plain_step import check_supported

    recipe = load_recipe(options.recipe, [
        *options.overrides, f"training.global_batch_size={options.batch}", "training.micro_batch_size=null",
        f"training.precision={options.precision}", f"data.train={folder}", f"data.validation={folder}"])
    if not isinstance(recipe, TokenizerRecipe):
        raise InputError(f"{options.recipe} is not a tokenizer's recipe; choose one of those")
    check_supported(recipe)
    return recipe


def step_of(recipe: TokenizerRecipe, phase: str) -> int:
    if phase == "auxiliary":
        return 1
    if recipe.loss.adversarial is None:
        raise InputError(f"{recipe.name} has no adversarial phase; choose --phase auxiliary")
    auxiliary = recipe.loss.auxiliary
    return max(recipe.loss.adversarial.start_step, auxiliary.end_step if auxiliary else 0)


# One side, in a process of its own


def random_perceptual() -> nn.Module:
    """LPIPS with VGG16's features and heads drawn at random, alike on both sides."""
    from torchvision.models import vgg16

    from gigatok_ds.losses.perceptual import LPIPS, READOUTS

    torch.manual_seed(SEED)
    features = vgg16().features[: max(READOUTS) + 1]
    heads = {f"lin{index}.model.1.weight": torch.rand(1, channels, 1, 1) / channels
             for index, channels in enumerate(READOUTS.values())}
    return LPIPS(features, heads)


def random_teacher(recipe: TokenizerRecipe) -> nn.Module | None:
    from gigatok_ds.losses.semantic import Teacher

    semantic = recipe.loss.semantic
    return Teacher(semantic.teacher, "random", grid=recipe.model.grid) if semantic else None


def images_of(recipe: TokenizerRecipe, device: torch.device) -> Tensor:
    """Smooth random images (B, 3, S, S) in [-1, 1]."""
    size, generator = recipe.model.image_size, torch.Generator().manual_seed(SEED)
    coarse = torch.randn(recipe.training.global_batch_size, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").tanh().to(device)


class Ours:
    def __init__(self, recipe: TokenizerRecipe, zero: int):
        from gigatok_ds.config.deepspeed import resolve_deepspeed, zero_settings
        from gigatok_ds.losses.composition import TokenizerObjective
        from gigatok_ds.parallel.topology import start_process_group
        from gigatok_ds.resilience.step_guard import StepGuard
        from gigatok_ds.training import tokenizer_task

        def objective(config, *, device, grid, precision):
            return TokenizerObjective(config, perceptual=random_perceptual(), teacher=random_teacher(recipe)).to(device)

        tokenizer_task.build_objective = objective
        topology = start_process_group()
        self.device = topology.device
        settings, _ = resolve_deepspeed(zero_settings(zero), recipe, data_parallel_size=1)
        self.task = tokenizer_task.TokenizerTask(recipe, topology, settings,
                                                 tokenizer_task.TokenizerTask.open_data(recipe, topology, settings))
        self.guard = StepGuard(recipe.faults, self.task.engines, topology, fp16=False)
        self.positions, self.lr = torch.arange(recipe.training.global_batch_size), recipe.optimizer.lr

    def __call__(self, images: Tensor, step: int) -> dict[str, Tensor]:
        self.guard.begin()
        logged = self.task.train_micro_batch({"images": images, "position": self.positions}, step)
        verdict = self.guard.finish(self.task.learning_rates(step, self.lr), logged)
        assert verdict.kind == "accept", verdict
        return {name: value for name, value in logged.items() if name.startswith(("loss/", "discriminator/"))}

    def norms(self) -> dict[str, float]:
        found = {name: engine.gradient_norm() for name, engine in self.task.engines.items()}
        return {f"gradient norm/{name}": float(norm) for name, norm in found.items() if norm is not None}


class Plain:
    def __init__(self, recipe: TokenizerRecipe, zero: int):
        from plain_step import PlainStep

        from gigatok_ds.losses.composition import build_discriminator
        from gigatok_ds.models.initialisation import initialise_
        from gigatok_ds.models.tokenizer import Tokenizer
        from gigatok_ds.streams import stream_key

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher = random_teacher(recipe)
        self.step = PlainStep(recipe, random_perceptual().to(self.device), teacher and teacher.to(self.device),
                              self.device)
        seed = recipe.training.seed
        self.step.generator.load_state_dict(initialise_(Tokenizer(recipe.model), seed).state_dict())
        if recipe.loss.adversarial:
            torch.manual_seed(stream_key(seed, "weights", "discriminator"))
            judge = build_discriminator(recipe.loss.adversarial, image_size=recipe.model.image_size)
            self.step.networks["discriminator"].load_state_dict(judge.state_dict())

    def __call__(self, images: Tensor, step: int) -> dict[str, Tensor]:
        return self.step(images, step)

    def norms(self) -> dict[str, float]:
        return {f"gradient norm/{name}": float(norm) for name, norm in self.step.norms.items()}


def run_side(options: argparse.Namespace) -> None:
    """Serve steps: one line of JSON for the first, with losses, and one for each line read afterwards."""
    from gigatok_ds.monitoring.memory import peak_memory

    torch.set_num_threads(options.threads)
    side, phase, folder = options.as_side
    recipe = resolve(options, Path(folder))
    run = (Ours if side == "ours" else Plain)(recipe, options.zero)
    images, step = images_of(recipe, run.device), step_of(recipe, phase)

    def timed() -> tuple[dict[str, Tensor], float]:
        synchronise(run.device)
        start = time.perf_counter()
        losses = run(images, step)
        synchronise(run.device)
        return losses, time.perf_counter() - start

    def answer(**values) -> None:
        print(json.dumps(values), file=answers, flush=True)

    # Whatever libraries print goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    losses, seconds = timed()
    first = {name: float(value.detach()) for name, value in losses.items()} | run.norms()
    answer(seconds=seconds, first=first, flops=flops_of(run, images, step) if side == "plain" else 0)
    for _ in sys.stdin:
        _, seconds = timed()
        answer(seconds=seconds, peak_gb=peak_memory(run.device))


def flops_of(run: Plain, images: Tensor, step: int) -> int:
    """Floating-point operations of a step: matrix products, convolutions and attention, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run(images, step)
    return counter.get_total_flops()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# Both sides


class Side:
    """A process that makes steps when told to."""

    def __init__(self, side: str, phase: str, folder: Path, options: argparse.Namespace):
        command = [sys.executable, __file__, "--recipe", options.recipe, "--batch", str(options.batch), "--precision",
                   options.precision, "--threads", str(options.threads), "--zero", str(options.zero),
                   *options.overrides, "--as-side", side, phase, str(folder)]
        self.name = side
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=os.environ | {"OMP_NUM_THREADS": str(options.threads)})

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise InputError(f"the process of {self.name} ended; what it said is above")
        return json.loads(line)

    def step(self) -> dict:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def differences(ours: dict[str, float], plain: dict[str, float], tolerance: float) -> list[str]:
    """Losses and gradient norms that only one side has or that differ by more than the tolerance."""
    found = [f"{name}: only one side has it" for name in sorted(ours.keys() ^ plain.keys())]
    for name in sorted(ours.keys() & plain.keys()):
        relative = abs(ours[name] - plain[name]) / max(abs(plain[name]), 0.1)
        if not relative <= tolerance:
            found.append(f"{name}: ours {ours[name]:.7g}, plain {plain[name]:.7g}")
    return found


def measure(phase: str, folder: Path, options: argparse.Namespace) -> dict[str, dict]:
    """Per side: median seconds and peak GB, and of plain the FLOPs.

    Raises InputError when the two sides compute something different, or one of them fails.
    """
    sides: list[Side] = []
    try:
        first = {}
        for name in SIDES:  # one after the other: the first step may compile something
            sides.append(Side(name, phase, folder, options))
            first[name] = sides[-1].answer()
        unlike = differences(first["ours"]["first"], first["plain"]["first"], TOLERANCE[options.precision])
        if unlike:
            raise InputError(f"{phase}: the two sides do not compute the same: {'; '.join(unlike)}")
        print(f"{phase}: {len(first['ours']['first'])} losses and gradient norms of both sides agree to "
              f"{TOLERANCE[options.precision]:g}", flush=True)
        answers = {side.name: [] for side in sides}
        for _ in range(options.warm_up + options.repeats):
            for side in sides:
                answers[side.name].append(side.step())
    finally:
        for side in sides:
            side.end()
    return {name: {"seconds": statistics.median(answer["seconds"] for answer in found[options.warm_up:]),
                   "peak_gb": found[-1]["peak_gb"], "flops": first[name]["flops"]} for name, found in answers.items()}


def report(phase: str, found: dict[str, dict], device: str, precision: str) -> bool:
    """Print the two lines of a phase and the verdict; are the targets met?"""
    ours, plain = found["ours"], found["plain"]
    for name in SIDES:
        line = f"{phase:12} {name:6} {found[name]['seconds'] * 1e3:10.1f} {found[name]['peak_gb']:10.2f}"
        ratios = f"{plain['seconds'] / ours['seconds']:8.2f} {plain['peak_gb'] / ours['peak_gb']:8.2f}"
        print(f"{line} {ratios}" if name == "plain" else line)
    ratio = plain["seconds"] / ours["seconds"]
    met = ratio >= TARGETS[device]
    print(f"{phase}: {ratio:.2f} x faster, target {TARGETS[device]}: {'met' if met else 'MISSED'}; "
          f"{plain['flops'] / 1e12:.2f} TFLOP, ours {plain['flops'] / ours['seconds'] / 1e12:.2f} TFLOP/s")
    if device == "cuda":
        peak = peak_of(torch.device("cuda"), precision)
        mfu = plain["flops"] / ours["seconds"] / (1e12 * peak) if peak else None
        met &= mfu is not None and mfu >= MFU_TARGET
        print(f"{phase}: MFU {'unknown for this device' if mfu is None else f'{mfu:.1%}'}, target {MFU_TARGET:.0%}")
    return met


def rows(phase: str, found: dict[str, dict], device: str, options: argparse.Namespace) -> list[Figure]:
    ours, plain = found["ours"], found["plain"]
    case = f"{options.recipe}, {phase}, {options.batch} images, {options.precision}, ZeRO {options.zero}"
    faster, smaller = (plain[name] / ours[name] for name in ("seconds", "peak_gb"))
    speed = plain["flops"] / ours["seconds"] / 1e12
    changes = f"; {' '.join(options.overrides)}" if options.overrides else ""
    return [Figure(case=case, unit="ms", ours=ours["seconds"] * 1e3, reference=plain["seconds"] * 1e3,
                   reference_name="plain eager step", ratio=faster, direction="x faster",
                   **figures.at_least(TARGETS[device], faster), notes=f"ours {speed:.3g} TFLOP/s{changes}"),
            Figure(case=case, unit="GB", ours=ours["peak_gb"], reference=plain["peak_gb"],
                   reference_name="plain eager step", ratio=smaller, direction="x smaller",
                   notes="peak of the process" if device == "cpu" else "held by torch")]


def header(options: argparse.Namespace, device: str) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {options.threads} threads"
    return (f"{date.today()}  python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}\n{where}; "
            f"torch {torch.__version__}, deepspeed {version('deepspeed')}, python {platform.python_version()}\n"
            f"{options.recipe}, {options.batch} images per step, {options.precision}, ZeRO stage {options.zero}; "
            f"median of {options.repeats} steps\n")


def write_images(folder: Path) -> None:
    """A few images as a task wants to find them; what is measured does not read them."""
    import io

    from PIL import Image

    from gigatok_ds.packing.shard_writer import Sample, write_shards

    def samples():
        for number in range(16):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16), (16 * number, 0, 0)).save(buffer, format="png")
            yield Sample(key=str(number), image_bytes=buffer.getvalue(), extension="png", label=0)

    write_shards(samples(), folder, prefix="images", classes=["one"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the recipe")
    parser.add_argument("--recipe", default="VQ_SS256")
    parser.add_argument("--batch", type=int, default=1, help="images per step")
    parser.add_argument("--precision", choices=tuple(TOLERANCE), default="fp32")
    parser.add_argument("--phase", choices=(*PHASES, "both"), default="both")
    parser.add_argument("--zero", type=int, choices=range(4), default=1, help="ZeRO stage of ours")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="steps of each side after the first that do not count")
    parser.add_argument("--as-side", nargs=3, metavar=("SIDE", "PHASE", "FOLDER"), help=argparse.SUPPRESS)
    figures.add_option(parser)
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.as_side:
        run_side(options)
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    phases = PHASES if options.phase == "both" else (options.phase,)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        write_images(folder)
        recipe = resolve(options, folder)
        for phase in phases:
            step_of(recipe, phase)
        print(header(options, device), flush=True)
        found = {phase: measure(phase, folder, options) for phase in phases}
    figures.write(options.json, [row for phase in phases for row in rows(phase, found[phase], device, options)])
    print(f"\n{'':19} {'median ms':>10} {'peak GB':>10} {'x slower':>8} {'x larger':>8}")
    return 0 if all(report(phase, result, device, options.precision) for phase, result in found.items()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"tokenizer_step.py: error: {error}", file=sys.stderr)
        sys.exit(2)
