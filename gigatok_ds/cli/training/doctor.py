"""Say what this installation runs on, why, and what would make it faster.

  gigatok-ds doctor
  gigatok-ds doctor --build

Looks at the native kernels (which ones are active, or why none are), devices, the compiler and CUDA toolkit that these
kernels are compiled with, DeepSpeed, Megatron-core, and whether an installed apex is NVIDIA's. The kernels are
compiled when first used; --build does it now and, if that failed before, tries again. Every part works without them.

Environment: GIGATOK_KERNELS=native or torch forces the choice; GIGATOK_BUILD_CUDA=0 or 1 forces whether CUDA kernels
are compiled; CXX, CUDA_HOME and TORCH_CUDA_ARCH_LIST count as usual.
"""

from __future__ import annotations

import argparse

HELP = "say what this installation runs on, and what would make it faster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--build", action="store_true", help="compile the native kernels now")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.kernels.installation import examine, report

    print(report(examine(build_now=args.build)))
    return 0
