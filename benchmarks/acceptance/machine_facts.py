"""The machine, what it can do at most, and the native kernels, compiled here or found."""

from __future__ import annotations

import subprocess
import time
from functools import partial

import torch

from acceptance.findings import Findings
from acceptance.section import Setting
from acceptance.timing import seconds_of
from gigatok_ds.kernels import build, native

_FIELDS = ("driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit",
           "temperature.gpu")


def run(setting: Setting, found: Findings) -> None:
    if setting.on_gpu:
        found.note(f"driver: {_of_the_driver()}")
        found.note(f"torch {torch.__version__} for CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
                   f"compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}")
    _compile(setting, found)
    _ceilings(setting, found)


def _of_the_driver() -> str:
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi does not answer ({type(error).__name__})"
    return ", ".join(f"{name} {value}" for name, value in zip(_FIELDS, said.splitlines()[0].split(", "), strict=False))


def _compile(setting: Setting, found: Findings) -> None:
    if setting.on_gpu and build.toolkit() is None and not build.locate():
        found.lacks("native kernels: there is no CUDA toolkit (nvcc), nor a compiled library in TORCH_EXTENSIONS_DIR; "
                    "the quantizer is looked at in plain PyTorch")
        return
    there, start = build.locate() is not None, time.monotonic()
    library = native.load()
    found.figure("native kernels, found" if there else "native kernels, compiled in", time.monotonic() - start, "s")
    found.check(f"the native kernels have loaded for {setting.device}", setting.device in library.devices,
                library.reason or f"they are for {', '.join(library.devices)}")


def _ceilings(setting: Setting, found: Findings) -> None:
    """What to compare other figures with: a copy of a large tensor, and a large matrix product of random numbers."""
    size, side, dtype = (2**32, 8192, torch.bfloat16) if setting.on_gpu else (2**26, 512, torch.float32)
    source = torch.empty(size, dtype=torch.uint8, device=setting.device).fill_(1)
    target = torch.empty_like(source)
    found.figure("memory, read and written", 2 * size / seconds_of(partial(target.copy_, source), setting) / 1e9,
                 "GB/s", f"copy of {size / 2**20:.0f} MiB")
    del source, target
    a, b = (torch.randn(side, side, device=setting.device, dtype=dtype) for _ in range(2))
    found.figure("matrix products", 2 * side**3 / seconds_of(lambda: a @ b, setting) / 1e12, "TFLOP/s",
                 f"{side} x {side}, {str(dtype).removeprefix('torch.')}")
