"""Nearest code and entropy penalty beside the references of benchmarks/quantizer.py: time, memory, distance to the
roofline.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from quantizer import CODES, DIM, MODES, WORDS
from quantizer import peak_of as peak_bytes_of

from acceptance.findings import Findings
from acceptance.section import Setting
from acceptance.timing import seconds_of
from gigatok_ds.kernels import native
from gigatok_ds.monitoring.throughput import peak_of

COUNTS = (8192, 65536)
# Products of N x K x D: the search has one; with the distances once more and the gradients of both sides there are
# four.
PRODUCTS = {"search": 1, "train": 4}


def run(setting: Setting, found: Findings) -> None:
    peak = peak_of(torch.device(setting.device), "fp32")
    has_native = setting.device in native.load().devices
    if not has_native:
        found.lacks(f"native kernels: {native.load().reason or 'none for this device'}")
    for count in (256,) if setting.quick else COUNTS:
        for task in PRODUCTS:
            seconds = {}
            for name in reversed([mode for of, mode in MODES if of == task]):  # ours first
                if (name == "native" and not has_native) or (name == "compiled" and not setting.on_gpu):
                    continue
                if not found.has_time(f"{task} of {count}, {WORDS[name]}", 2):
                    continue
                _measure(setting, found, task, name, count, seconds, peak)


def _measure(setting: Setting, found: Findings, task: str, name: str, count: int, seconds: dict[str, float],
             peak: float | None) -> None:
    function, (latents, codebook) = MODES[task, name], _inputs(count, 1024 if setting.quick else CODES, setting.device)
    what = f"{task}, N {count}, {WORDS[name]}"
    if name in ("torch", "native"):
        os.environ["GIGATOK_KERNELS"] = name
    try:
        seconds[name] = seconds_of(lambda: function(latents, codebook), setting)
    except torch.OutOfMemoryError:
        found.lacks(f"{what}: it does not fit this GPU")
        return
    finally:
        os.environ.pop("GIGATOK_KERNELS", None)
    found.figure(what, seconds[name] * 1e6, "us",
                 _notes(setting, function, latents, codebook, task, name, seconds, peak))


def _inputs(count: int, size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, codebook = (F.normalize(torch.randn(rows, DIM, generator=generator), dim=1).to(device) for rows
                         in (count, size))
    return latents, codebook


def _notes(setting: Setting, function: Callable, latents: torch.Tensor, codebook: torch.Tensor, task: str, name: str,
           seconds: dict[str, float], peak: float | None) -> str:
    words = []
    if setting.on_gpu:
        words.append(
            f"{peak_bytes_of(lambda: function(latents, codebook), setting.device) / 2**20:.1f} MiB beyond the inputs"
        )
    if peak:
        operations = 2 * len(latents) * len(codebook) * DIM * PRODUCTS[task]
        words.append(
            f"{operations / (1e12 * peak) / seconds[name]:.0%} of the roofline of {PRODUCTS[task]} products at "
            f"{peak:g} TFLOP/s, float32 outside the tensor cores"
        )
    if "native" in seconds and name != "native":
        words.append(f"{seconds[name] / seconds['native']:.2f} x the time of ours, native")
    return "; ".join(words)
