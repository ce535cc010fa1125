"""What each CUDA kernel of the quantizer takes of a GPU, as the compiler says: registers, shared memory, spills.

    python benchmarks/cuda_resources.py [--arch 80 90 100]

Needs a CUDA toolkit (nvcc; set CUDA_HOME), no GPU. Spilled registers go to memory and make a kernel slow.
Exit code 1: a kernel for up to 32 dimensions spills.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import figures
from figures import Figure
from torch.utils.cpp_extension import include_paths

from gigatok_ds.errors import InputError
from gigatok_ds.kernels import build

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200
_KERNEL = re.compile(
    r"Function properties for (?P<symbol>\S+)\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\s+ptxas info\s+: Used (?P<registers>\d+) registers(?P<rest>.*)")
_SWEEP = re.compile(r"(Assign|Average|LatentGradient|CodeGradient)IfLi(\d+)E(?:Lb([01])E)?")
_DISTANCES = re.compile(r"recheck_kernelILi(\d+)E")
_NAMES = {"Assign0": "search", "Assign1": "search and softmax", "Average": "mean assignment",
          "LatentGradient": "gradient at latents", "CodeGradient": "gradient at codes"}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    name: str
    dim: int  # of the codes
    registers: int
    shared_bytes: int
    spilled_bytes: int


def compiled_kernels(architecture: int) -> list[Kernel]:
    """Compile cuda.cu for one architecture and read the assembler's report. Raises InputError without a toolkit."""
    toolkit = build.toolkit()
    if toolkit is None:
        raise InputError("no CUDA toolkit: nvcc is not on the PATH; install one, or set CUDA_HOME to its folder")
    with tempfile.TemporaryDirectory() as folder:
        command = [str(toolkit / "bin" / "nvcc"), *build.DEVICE_FLAGS, *(f"-I{path}" for path in include_paths("cpu")),
                   "-Xptxas", "-v", "-gencode", f"arch=compute_{architecture},code=sm_{architecture}", "-cubin",
                   str(build.SOURCES / "cuda.cu"), "-o", str(Path(folder) / "kernels.cubin")]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise InputError(f"nvcc cannot compile the kernels for sm_{architecture}: {finished.stderr.strip()[-2000:]}")
    return sorted(kernels_in(finished.stderr + finished.stdout), key=lambda kernel: (kernel.dim, kernel.name))


def kernels_in(report: str) -> Iterator[Kernel]:
    for match in _KERNEL.finditer(report):
        sweep = _SWEEP.search(match["symbol"])
        if sweep:
            name, dim = _NAMES[sweep[1] + (sweep[3] or "")], int(sweep[2])
        elif "filter_kernel" in match["symbol"]:
            name, dim = "search, tensor cores", 8
        elif distances := _DISTANCES.search(match["symbol"]):
            name, dim = "distances after it", int(distances[1])
        else:
            continue  # a simple pass over an array
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        yield Kernel(name=name, dim=dim, registers=int(match["registers"]),
                     shared_bytes=int(shared[1]) if shared else 0,
                     spilled_bytes=int(match["stores"]) + int(match["loads"]))


def table(found: dict[int, list[Kernel]]) -> str:
    lines = [f"{'kernel':22} {'dim':>4}" + "".join(f" | {f'sm_{architecture}: regs':>12} {'smem':>6} {'spill':>6}"
                                                    for architecture in found)]
    lines += [f"{row[0].name:22} {row[0].dim:4}" + "".join(
        f" | {kernel.registers:12} {kernel.shared_bytes:6} {kernel.spilled_bytes:6}" for kernel in row)
        for row in zip(*found.values(), strict=True)]
    return "\n".join(lines)


def rows(found: dict[int, list[Kernel]]) -> Iterator[Figure]:
    for architecture, kernels in found.items():
        promised = [kernel for kernel in kernels if kernel.dim <= 32]
        spilled = sum(kernel.spilled_bytes for kernel in promised)
        wide = sum(kernel.spilled_bytes for kernel in kernels) - spilled
        yield Figure(
            case=f"sm_{architecture}, up to 32 dimensions",
            unit="bytes spilled",
            ours=spilled,
            target="none",
            met=not spilled,
            notes=f"{max(kernel.registers for kernel in promised)} registers at most; with 64 "
            f"dimensions {wide} bytes are spilled",
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, times ten")
    figures.add_option(parser)
    arguments = parser.parse_args(argv)
    if build.toolkit() is None:
        figures.skip(arguments.json, "no CUDA toolkit (nvcc)")
    try:
        found = {architecture: compiled_kernels(architecture) for architecture in arguments.arch}
    except InputError as error:
        print(f"cuda_resources: error: {error}", file=sys.stderr)
        return 2
    print(table(found))
    figures.write(arguments.json, list(rows(found)))
    spilling = [kernel for kernels in found.values() for kernel in kernels if kernel.spilled_bytes and kernel.dim <= 32]
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
