"""3x3 convolutions of a tokenizer's training on a CPU (float32): ours, by Winograd's transform, beside torch's own.

    python benchmarks/convolution.py [--threads 2] [--repeats 5] [--sides 16 32 64 128 256]

One image, as many channels as VQ_SS256 has at that size, forward and backward; medians of alternating runs. Errors are
those of the output against float64, relative to its norm. The smallest maps say why ours leaves them to torch:
Winograd's transform is used there for this table only. Exit code 1: ours is not faster where it is used, or further
than 5e-6 from float64.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from datetime import date

import figures
import torch
from figures import Figure
from machine import processor
from torch import Tensor, nn

from gigatok_ds.cpu import convolution
from gigatok_ds.cpu.malloc import keep_freed_memory
from gigatok_ds.cpu.winograd import has_winograd

CHANNELS = {16: 512, 32: 256, 64: 256, 128: 128, 256: 128}  # by side, of VQ_SS256
TOLERANCE = 5e-6


def error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def compare(side: int, repeats: int) -> dict[str, dict[str, float]]:
    """Per side: median seconds of forward and backward, and the error of the output."""
    channels = CHANNELS[side]
    torch.manual_seed(0)
    networks = {"ours": nn.Conv2d(channels, channels, 3, padding=1),
                "torch": nn.Conv2d(channels, channels, 3, padding=1)}
    convolution.use_winograd(networks["ours"])
    networks["torch"].load_state_dict(networks["ours"].state_dict())
    exact = nn.Conv2d(channels, channels, 3, padding=1, dtype=torch.float64)
    exact.load_state_dict(networks["ours"].state_dict())
    x, gradient = torch.randn(2, 1, channels, side, side)
    x.requires_grad_()
    with torch.no_grad():
        expected = exact(x.double())
        errors = {name: error(network(x), expected) for name, network in networks.items()}
    seconds = {name: [] for name in networks}
    for _ in range(repeats + 1):
        for name, network in networks.items():
            start = time.perf_counter()
            network(x).backward(gradient)
            seconds[name].append(time.perf_counter() - start)
    return {name: {"seconds": statistics.median(found[1:]), "error": errors[name]} for name, found in seconds.items()}


def row(side: int, found: dict[str, dict[str, float]], used: bool) -> Figure:
    ours, theirs = found["ours"], found["torch"]
    faster = theirs["seconds"] / ours["seconds"]
    errors = f"errors {ours['error']:.1e} and {theirs['error']:.1e}"
    return Figure(case=f"{CHANNELS[side]} channels, {side} x {side}", unit="ms", ours=ours["seconds"] * 1e3,
                  reference=theirs["seconds"] * 1e3, reference_name="torch's convolution", ratio=faster,
                  direction="x faster",
                  **figures.at_least(1.0 if used else None, faster),
                  notes=errors if used else f"{errors}; not used there")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sides", type=int, nargs="+", choices=CHANNELS, default=list(CHANNELS),
                        help="of maps, in positions")
    figures.add_option(parser)
    arguments = parser.parse_args()
    if not has_winograd(torch.ones(1)):
        print("no native kernels (gigatok-ds doctor says why): ours is torch's convolution here")
        figures.skip(arguments.json, "no native kernels")
        return 0
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    limits = convolution.MIN_POSITIONS, convolution.MAX_FILTERS
    used = [side for side in arguments.sides if side**2 >= limits[0] and CHANNELS[side] ** 2 <= limits[1] * side**2]
    convolution.MIN_POSITIONS, convolution.MAX_FILTERS = 0, float("inf")
    print(f"{date.today()}  python {' '.join(sys.argv)}\n{processor()}, {arguments.threads} threads; torch "
          f"{torch.__version__}, python {platform.python_version()}\n\n{'':26} {'ours ms':>8} {'torch ms':>8} "
          f"{'x faster':>8}")
    rows, wrong = [], []
    for side in arguments.sides:
        found = compare(side, arguments.repeats)
        rows.append(row(side, found, side in used))
        print(f"{rows[-1].case:26} {rows[-1].ours:8.1f} {rows[-1].reference:8.1f} {rows[-1].ratio:8.2f}  "
              f"{rows[-1].notes}",
              flush=True)
        if not found["ours"]["error"] <= TOLERANCE:
            wrong.append(f"{rows[-1].case}: {found['ours']['error']:.1e} from float64, allowed {TOLERANCE:g}")
    figures.write(arguments.json, rows, wrong)
    for problem in wrong:
        print(f"convolution.py: {problem}")
    missed = [figure.case for figure in rows if figure.met is False]
    if missed:
        print(f"MISSED: not faster than torch for {'; '.join(missed)}")
    return 1 if missed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
