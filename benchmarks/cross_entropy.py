"""The vocabulary head's cross-entropy in chunks, beside projecting everything and taking the loss of float32 logits.

    python benchmarks/cross_entropy.py [--device cuda] [--threads 2] [--width 768] [--sequences 32] [--precision bf16]

Both compute the loss of each of sequences x 256 codes out of 16,384, and the gradients of their mean in the head's
input and weight, each in a process of its own: the time of one forward and backward after a small one, and the most
memory held beyond the inputs (on a CPU the growth of the resident set, on a GPU torch's own count), which includes the
gradients.

Exit code 1: ours holds more than a quarter, or losses or gradients differ by more than 1e-3 of their norm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import figures
import torch
import torch.nn.functional as F
from figures import Figure
from machine import processor
from torch import Tensor

from gigatok_ds.parallel.cross_entropy import head_cross_entropy

CODES, VOCABULARY = 256, 16384
SMALLER, TOLERANCE = 4.0, 1e-3
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORDS = {"naive": "all logits, float32", "ours": "ours, in chunks"}
PARTS = ("losses", "gradient of the input", "gradient of the weight")


def naive_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="none")


MODES: dict[str, Callable] = {"naive": naive_losses, "ours": head_cross_entropy}


# One process


def problem(rows: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised states, a head that gives logits of unit size, and targets; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)
    weight = torch.randn(VOCABULARY, width, generator=generator) * width**-0.5
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    return tuple(tensor.to(device) for tensor in (x.to(dtype), weight.to(dtype), targets))


def gradients_of(mode: str, x: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Losses, and the gradients of their mean in x and weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    losses = MODES[mode](x, weight, targets)
    return [losses.detach(), *torch.autograd.grad(losses.mean(), (x, weight))]


def run_mode(mode: str, arguments: argparse.Namespace, results: Path) -> dict:
    x, weight, targets = problem(arguments.sequences * CODES, arguments.width, PRECISIONS[arguments.precision],
                                 arguments.device)
    gradients_of(mode, x[:64], weight, targets[:64])  # loading code and starting threads is no part of the measurement
    found = []
    start = time.perf_counter()
    extra = peak_of(lambda: found.extend(gradients_of(mode, x, weight, targets)), arguments.device)
    seconds = time.perf_counter() - start
    torch.save([part.cpu() for part in found], results)
    return {"seconds": seconds, "extra_bytes": extra}


def peak_of(function: Callable, device: str) -> int:
    """Most bytes held while `function` runs beyond those held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
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


# Both processes


def measure(mode: str, folder: Path) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--as-mode", mode, str(folder / mode)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def relative_differences(ours: list[Tensor], theirs: list[Tensor]) -> list[float]:
    """Norm of the difference over the norm, of losses and both gradients."""
    return [((mine.double() - other.double()).norm() / other.double().norm()).item()
            for mine, other in zip(ours, theirs, strict=True)]


def verdict(found: dict[str, dict], differences: list[float]) -> bool:
    ratio = found["naive"]["extra_bytes"] / max(found["ours"]["extra_bytes"], 1)
    print(f"\nmemory: {ratio:.1f} x smaller, target {SMALLER:g}: {'met' if ratio >= SMALLER else 'MISSED'}")
    for part, difference in zip(PARTS, differences, strict=True):
        print(f"{part}: differ by {difference:.1e} of their norm, target {TOLERANCE:g}: "
              f"{'met' if difference <= TOLERANCE else 'MISSED'}")
    return ratio >= SMALLER and all(difference <= TOLERANCE for difference in differences)


def rows(found: dict[str, dict], differences: list[float], case: str) -> list[Figure]:
    ours, naive = found["ours"], found["naive"]
    faster, smaller = naive["seconds"] / ours["seconds"], naive["extra_bytes"] / max(ours["extra_bytes"], 1)
    alike = ", ".join(f"{part} {difference:.1e}" for part, difference in zip(PARTS, differences, strict=True))
    return [Figure(case=case, unit="s", ours=ours["seconds"], reference=naive["seconds"], reference_name=WORDS["naive"],
                   ratio=faster, direction="x faster", notes="one forward and backward"),
            Figure(case=case, unit="MiB", ours=ours["extra_bytes"] / 2**20, reference=naive["extra_bytes"] / 2**20,
                   reference_name=WORDS["naive"], ratio=smaller, direction="x smaller",
                   **figures.at_least(SMALLER, smaller), notes=f"relative differences: {alike}")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--width", type=int, default=768, help="of the model (default: GPT-B's)")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--as-mode", nargs=2, metavar=("MODE", "FILE"), help=argparse.SUPPRESS)
    figures.add_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.as_mode:
        print(json.dumps(run_mode(arguments.as_mode[0], arguments, Path(arguments.as_mode[1]))))
        return 0
    on_cpu = arguments.device == "cpu"
    device = f"{processor()}, {arguments.threads} threads" if on_cpu else torch.cuda.get_device_name()
    print(f"{date.today()}  python {' '.join(sys.argv)}\n{device}; torch {torch.__version__}, "
          f"python {platform.python_version()}\n\n{arguments.sequences} x {CODES} codes of {VOCABULARY}, width "
          f"{arguments.width}, {arguments.precision}\n{'':20} {'seconds':>8} {'extra MiB':>10}")
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for mode in MODES:
            found[mode] = measure(mode, Path(name))
            seconds, extra = found[mode]["seconds"], found[mode]["extra_bytes"]
            print(f"{WORDS[mode]:20} {seconds:8.1f} {extra / 2**20:10.1f}", flush=True)
        parts = {mode: torch.load(Path(name) / mode, weights_only=True) for mode in MODES}
    differences = relative_differences(parts["ours"], parts["naive"])
    case = f"{arguments.sequences} x {CODES} codes of {VOCABULARY}, width {arguments.width}, {arguments.precision}"
    wrong = [f"{part}: differ by {difference:.1e} of their norm"
             for part, difference in zip(PARTS, differences, strict=True) if difference > TOLERANCE]
    figures.write(arguments.json, rows(found, differences, case), wrong)
    return 0 if verdict(found, differences) else 1


if __name__ == "__main__":
    sys.exit(main())
