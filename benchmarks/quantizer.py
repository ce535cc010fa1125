"""Nearest code and entropy loss: ours beside the original's formulation and the best plain PyTorch.

    python benchmarks/quantizer.py [--device cuda] [--threads 2] [--repeats 5] [--seconds 3] [--latents 8192]
        [--tasks search train] [--quick]

Each line is measured in a process of its own, on unit vectors drawn from a fixed seed: the median time after a warm-up,
of 5 runs or 3 seconds, whichever is longer, and the most memory held beyond the inputs (on a CPU the growth of the
resident set, on a GPU torch's own count). "search" finds the nearest code of each latent. "train" also computes the
entropy penalty and its gradients in latents and codebook. A machine that others use at the same time gives no figure
worth keeping.

Exit code 1: ours misses a target, which are for N = 8192, K = 16384, D = 8; with other `--latents` there is none, and
the exit code is 1 only if something could not be measured. `--quick` leaves out how time and memory grow.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from pathlib import Path

import figures
import torch
import torch.nn.functional as F
from figures import Figure
from machine import processor
from torch import Tensor

from gigatok_ds.kernels import native
from gigatok_ds.kernels.ops import assignment_statistics, entropy_penalty, nearest_code

LATENTS, CODES, DIM = 8192, 16384, 8
TASKS = ("search", "train")
TEMPERATURE = 0.01
PAGE = 4096  # bytes: a resident set shows nothing smaller
GROWTH = ((8192, 16384), (16384, 16384), (65536, 16384), (8192, 65536), (8192, 262144))
# Task, the mode that ours is compared with, and how many times faster and smaller ours must be, by device.
TARGETS = {
    "cpu": (("search", "addmm", 12, None), ("search", "original", 30, 200), ("train", "original", 25, 200)),
    "cuda": (("search", "original", 10, 200), ("search", "compiled", 5, None), ("train", "original", 15, 200),
             ("train", "compiled", 5, None)),
}


@dataclass(kw_only=True)
class Measurement:
    seconds: float
    extra_bytes: int


def original_distances(latents: Tensor, codebook: Tensor) -> Tensor:
    squares = (latents**2).sum(1, keepdim=True) + (codebook**2).sum(1)
    return squares - 2 * torch.einsum("nd,kd->nk", latents, codebook)


def original_search(latents: Tensor, codebook: Tensor) -> Tensor:
    return original_distances(latents, codebook).argmin(1)


def original_loss(latents: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The original's search and entropy loss, its 1e-5 in the logarithm of the softmax included."""
    distances = original_distances(latents, codebook)
    logits = -distances / TEMPERATURE
    p, log_p = logits.softmax(1), (logits + 1e-5).log_softmax(1)
    q = p.mean(0)
    return distances.argmin(1), -(p * log_p).sum(1).mean() + (q * (q + 1e-5).log()).sum()


def addmm_search(latents: Tensor, codebook: Tensor) -> Tensor:
    return torch.addmm(-codebook.square().sum(1) / 2, latents, codebook.t()).argmax(1)


def trained(loss: Callable) -> Callable:
    """Forward and backward of `loss`, whose last result is the scalar."""
    def step(latents: Tensor, codebook: Tensor):
        inputs = latents.requires_grad_(), codebook.requires_grad_()
        result = loss(*inputs)
        return torch.autograd.grad(result[-1] if isinstance(result, tuple) else result, inputs)

    return step


@cache
def by_compiler(function: Callable) -> Callable:
    return torch.compile(function)


def compiled(function: Callable) -> Callable:
    """Compiled when it is first called: the compiler alone takes seconds to import."""
    return lambda latents, codebook: by_compiler(function)(latents, codebook)


def our_search(latents: Tensor, codebook: Tensor) -> Tensor:
    return nearest_code(latents, codebook, strict=False)


def our_loss(latents: Tensor, codebook: Tensor) -> Tensor:
    return entropy_penalty(assignment_statistics(latents, codebook, TEMPERATURE, strict=False))


MODES: dict[tuple[str, str], Callable] = {
    ("search", "original"): original_search,
    ("search", "compiled"): compiled(original_search),
    ("search", "addmm"): addmm_search,
    ("search", "torch"): our_search,
    ("search", "native"): our_search,
    ("train", "original"): trained(original_loss),
    ("train", "compiled"): trained(compiled(original_loss)),
    ("train", "torch"): trained(our_loss),
    ("train", "native"): trained(our_loss),
}
WORDS = {
    "original": "original formulation", "compiled": "the same, torch.compile", "addmm": "addmm + argmax",
    "torch": "ours, plain PyTorch", "native": "ours, native",
}


# One process


def run_mode(task: str, mode: str, count: int, size: int, device: str, repeats: int, seconds: float) -> Measurement:
    generator = torch.Generator().manual_seed(0)
    latents, codebook = (F.normalize(torch.randn(rows, DIM, generator=generator), dim=1).to(device)
                         for rows in (count, size))
    function = MODES[task, mode]
    # On a few rows, so that loading code and starting threads is no part of the measurement.
    function(latents[:64].clone(), codebook[:64].clone())
    extra = peak_of(lambda: function(latents, codebook), device)
    times = []
    while len(times) < repeats or sum(times) < seconds:
        synchronise(device)
        start = time.perf_counter()
        function(latents, codebook)
        synchronise(device)
        times.append(time.perf_counter() - start)
    return Measurement(seconds=statistics.median(times), extra_bytes=extra)


def peak_of(function: Callable, device: str) -> int:
    """Most bytes held while `function` runs beyond those held before."""
    if device == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronise(device)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# All processes


def measure(task: str, mode: str, count: int, size: int, arguments: argparse.Namespace) -> Measurement | None:
    """One line's figures, or None when its process failed (after showing why)."""
    command = [sys.executable, __file__, "--device", arguments.device, "--repeats", str(arguments.repeats),
               "--seconds", str(arguments.seconds), "--threads", str(arguments.threads),
               "--as-mode", task, mode, str(count), str(size)]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    if mode in ("torch", "native"):
        environment["GIGATOK_KERNELS"] = mode
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        print(f"{task} {mode} failed: {finished.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return Measurement(**json.loads(finished.stdout.splitlines()[-1]))


def header(arguments: argparse.Namespace) -> str:
    library = native.load()
    if arguments.device == "cuda":
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        device = f"{processor()}, {arguments.threads} threads"
    kernels = torch.ops.gigatok_native.cpu_capability() if library.path else f"none ({library.reason})"
    return (f"{date.today()}  python {' '.join(sys.argv)}\n{device}; torch {torch.__version__}, "
            f"python {platform.python_version()}; native kernels: {kernels}\n")


def modes(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    return [(task, mode) for task, mode in MODES
            if task in arguments.tasks and (arguments.device == "cuda" or mode != "compiled")]


def compare(arguments: argparse.Namespace) -> dict[tuple[str, str], Measurement]:
    """Every mode at the standard size."""
    print(f"N = {arguments.latents}, K = {CODES}, D = {DIM}")
    print(f"{'':7} {'':25} {'median ms':>10} {'extra MiB':>10} {'x slower':>9} {'x larger':>9}")
    found = {}
    for key in reversed(modes(arguments)):  # ours first, so that the others can be compared with it
        if result := measure(*key, arguments.latents, CODES, arguments):
            found[key] = result
            print(line(key, result, found), flush=True)
    print()
    return found


def line(key: tuple[str, str], result: Measurement, found: dict) -> str:
    figures = f"{key[0]:7} {WORDS[key[1]]:25} {result.seconds * 1e3:10.2f} {result.extra_bytes / 2**20:10.2f}"
    ours = found.get((key[0], "native"))
    if ours is None or ours is result:
        return figures
    return f"{figures} {result.seconds / ours.seconds:9.1f} {result.extra_bytes / max(ours.extra_bytes, 1):9.0f}"


def grow(arguments: argparse.Namespace, mode: str) -> None:
    print(f"{WORDS[mode]}: growth\n{'N':>7} {'K':>7} {'search ms':>10} {'extra MiB':>10} {'train ms':>10} "
          f"{'extra MiB':>10}")
    for count, size in GROWTH:
        results = [measure(task, mode, count, size, arguments) if task in arguments.tasks else None for task in TASKS]
        cells = ["         -          -" if result is None else
                 f"{result.seconds * 1e3:10.2f} {result.extra_bytes / 2**20:10.2f}" for result in results]
        print(f"{count:7} {size:7} {cells[0]} {cells[1]}", flush=True)
    print()


def targets(arguments: argparse.Namespace) -> tuple:
    return tuple(target for target in TARGETS[arguments.device]
                 if arguments.latents == LATENTS and target[0] in arguments.tasks)


def verdicts(found: dict[tuple[str, str], Measurement], arguments: argparse.Namespace) -> bool:
    """Print each target and whether it is met; are all?"""
    all_met = True
    for task, other, faster, smaller in targets(arguments):
        ours, theirs = found.get((task, "native")), found.get((task, other))
        if ours is None or theirs is None:
            print(f"{task} against {WORDS[other]}: not measured")
            all_met = False
            continue
        ratios = [("faster", theirs.seconds / ours.seconds, faster),
                  ("smaller", theirs.extra_bytes / max(ours.extra_bytes, 1), smaller)]
        for word, ratio, target in ratios:
            if target is not None:
                met = ratio >= target
                all_met &= met
                print(f"{task} against {WORDS[other]}: {ratio:.1f} x {word}, target {target}: "
                      f"{'met' if met else 'MISSED'}")
    return all_met


def rows(found: dict[tuple[str, str], Measurement], arguments: argparse.Namespace) -> Iterator[Figure]:
    """Time and memory of each pair that `compare` measured."""
    wanted = {(task, other): (faster, smaller) for task, other, faster, smaller in targets(arguments)}
    for (task, other), theirs in found.items():
        ours = found.get((task, "native"))
        if ours is None or other == "native":
            continue
        case = f"{task}, N = {arguments.latents}, K = {CODES}, D = {DIM}"
        faster, smaller = wanted.get((task, other), (None, None))
        kinds = [("ms", "x faster", ours.seconds * 1e3, theirs.seconds * 1e3, faster),
                 ("MiB", "x smaller", max(ours.extra_bytes, PAGE) / 2**20, theirs.extra_bytes / 2**20, smaller)]
        for unit, direction, mine, reference, target in kinds:
            ratio = reference / mine
            yield Figure(case=case, unit=unit, ours=mine, reference=reference, reference_name=WORDS[other], ratio=ratio,
                         direction=direction, **figures.at_least(target, ratio))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="measure for at least so long, since a short "
                                                                   "disturbance "
                        "must not be the median (default: %(default)s)")
    parser.add_argument("--latents", type=int, default=LATENTS, help="N of the comparison (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="measure these alone")
    parser.add_argument("--quick", action="store_true", help="leave out the growth in N and K")
    parser.add_argument("--as-mode", nargs=4, metavar=("TASK", "MODE", "N", "K"), help=argparse.SUPPRESS)
    figures.add_option(parser)
    arguments = parser.parse_args()
    if arguments.as_mode:
        torch.set_num_threads(arguments.threads)
        task, mode, count, size = arguments.as_mode
        result = run_mode(task, mode, int(count), int(size), arguments.device, arguments.repeats, arguments.seconds)
        print(json.dumps(asdict(result)))
        return 0
    print(header(arguments))
    found = compare(arguments)
    if not arguments.quick:
        grow(arguments, "native" if any(mode == "native" for _, mode in found) else "torch")
    missing = [f"{task}, {WORDS[mode]}: not measured" for task, mode in modes(arguments) if (task, mode) not in found]
    figures.write(arguments.json, list(rows(found, arguments)), missing)
    return 0 if verdicts(found, arguments) and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
