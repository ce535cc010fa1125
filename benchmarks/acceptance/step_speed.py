"""Training steps as users take them, under DeepSpeed: throughput, MFU, what the time goes to, and waits for the device.
"""

from __future__ import annotations

import gc
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizer_step import images_of, write_images
from torch.profiler import ProfilerActivity, profile

from acceptance.findings import Findings
from acceptance.section import Setting
from gigatok_ds.config.deepspeed import resolve_deepspeed, zero_settings
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.recipe import GPTRecipe, Recipe
from gigatok_ds.data.codes import CodeSample, write_code_shards
from gigatok_ds.monitoring.throughput import peak_of
from gigatok_ds.parallel.topology import Topology, start_process_group, stop_process_group
from gigatok_ds.planning.auto import plan_here
from gigatok_ds.resilience.step_guard import StepGuard
from gigatok_ds.training.gpt_task import GPTTask
from gigatok_ds.training.tokenizer_task import TokenizerTask

# Least seconds to build, compile and measure each, on a recent GPU.
CASES = {"GPT-B": 20, "VQ_SS256": 30, "GPT-XL": 30, "VQ_BL256": 40}
QUICK = ("demo_gpt", "demo_tokenizer")
LOSSES = ["loss.perceptual.weights=random", "loss.semantic.weights=random"]
MOST_EXPENSIVE = 10
# What a matrix product, a convolution or attention is called among a GPU's kernels.
_PRODUCTS = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|conv|wgrad|dgrad|fprop|winograd|flash|fmha|attention|mma_|cublas",
                       re.IGNORECASE)


def run(setting: Setting, found: Findings) -> None:
    torch.set_float32_matmul_precision("high")
    topology = start_process_group()
    try:
        for name, seconds in (dict.fromkeys(QUICK, 1) if setting.quick else CASES).items():
            for mode in ("none", "default") if setting.on_gpu else ("none",):
                if found.has_time(f"{name}, {_words(mode)}", seconds):
                    _case(name, mode, setting, topology, found)
                    gc.collect()
                    torch._dynamo.reset()
                    if setting.on_gpu:
                        torch.cuda.empty_cache()
    finally:
        stop_process_group(topology)


def _words(mode: str) -> str:
    return "eager" if mode == "none" else "compiled"


def _case(name: str, mode: str, setting: Setting, topology: Topology, found: Findings) -> None:
    recipe = _recipe(name, mode, setting)
    step = _step_of(recipe, topology)
    steps = 2 if setting.quick else 10
    for _ in range(1 if setting.quick else 3):
        step()
    setting.synchronise()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    setting.synchronise()
    seconds, batch = (time.perf_counter() - start) / steps, recipe.training.global_batch_size
    what = f"{name}, {_words(mode)}"
    found.figure(f"{what}: a step", seconds * 1e3, "ms",
                 f"{batch} samples, step {step.number} of the recipe, {batch / seconds:.3g}/s")
    peak = peak_of(topology.device, recipe.training.precision)
    if peak:
        found.figure(f"{what}: MFU", 100 * step.flops / seconds / (1e12 * peak), "%", f"of {peak:g} TFLOP/s")
    if setting.on_gpu:
        _waits(what, step, found)
        _kernels(what, step, seconds, found)


def _recipe(name: str, mode: str, setting: Setting) -> Recipe:
    """The recipe as published, in bf16 on a GPU, in the micro batch that `gigatok-ds plan` recommends there."""
    folder, is_gpt = setting.folder / name, "gpt" in name.lower()
    if not folder.exists():
        (_codes if is_gpt else write_images)(folder)
    changes = [f"data.train={folder}", f"data.validation={folder}", f"training.compile={mode}", "data.workers=0"]
    if not is_gpt and not setting.quick:
        changes += LOSSES
    if setting.on_gpu:
        changes.append("training.precision=bf16")
        micro = plan_here(load_recipe(name, changes)).layout.micro
    else:
        micro = 4
    return load_recipe(name, [*changes, f"training.global_batch_size={micro}", "training.micro_batch_size=null"])


def _codes(folder: Path) -> None:
    """As many random codes as fit any of the recipes."""
    length, size = (16, 128) if folder.name == "demo_gpt" else (256, 16384)
    generator = np.random.default_rng(0)
    samples = (CodeSample(key=f"s{number}", codes=generator.integers(0, size, (1, length)), label=number % 10)
               for number in range(64))
    write_code_shards(samples, folder, codebook_size=size, latent_tokens=length, provenance={})


class _Step:
    """A whole step on a batch that is on the device already, as the training loop takes it."""

    def __init__(self, task: GPTTask | TokenizerTask, guard: StepGuard, batch: dict, number: int, lr: float):
        self.task, self.guard, self.batch, self.number, self.lr = task, guard, batch, number, lr
        self.flops, self.begun = task.flops.of_step(number).model, False

    def __call__(self) -> None:
        """As in the loop, the host hears of a step when the next one has been enqueued."""
        self.guard.begin()
        logged = self.task.train_micro_batch(self.batch, self.number)
        if self.begun:
            self.guard.verdict()
        self.guard.decide(self.task.learning_rates(self.number, self.lr), logged)
        self.begun = True


def _step_of(recipe: Recipe, topology: Topology) -> _Step:
    device = topology.device
    settings, _ = resolve_deepspeed(zero_settings(1), recipe, data_parallel_size=1)
    count = recipe.training.global_batch_size
    if isinstance(recipe, GPTRecipe):
        task, number = GPTTask(recipe, topology, settings, GPTTask.open_data(recipe, topology, settings)), 1
        codes = torch.randint(recipe.model.vocab_size, (count, recipe.model.sequence_length), device=device)
        labels = torch.arange(count, device=device) % recipe.model.num_classes
        batch = {"codes": codes, "labels": labels, "position": torch.arange(count)}
    else:
        task = TokenizerTask(recipe, topology, settings, TokenizerTask.open_data(recipe, topology, settings))
        number = recipe.loss.adversarial.start_step  # every network takes part
        batch = {"images": images_of(recipe, device), "position": torch.arange(count)}
    guard = StepGuard(recipe.faults, task.engines, topology, fp16=False)
    return _Step(task, guard, batch, number, recipe.optimizer.lr)


def _waits(what: str, step: Callable[[], None], found: Findings) -> None:
    """How often a step makes the host wait for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = {f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught if "synchroniz"
              in str(warning.message)}
    found.check(f"{what}: no step waits for the device", not places,
                f"waits in {', '.join(sorted(places))}" if places else "")


def _kernels(what: str, step: Callable[[], None], seconds: float, found: Findings) -> None:
    """The kernels that take most of a step, and the share of all that are no products."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    kernels = sorted((event for event in recorded.key_averages() if event.self_device_time_total > 0),
                     key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    if not total:
        found.lacks(f"{what}: the profiler saw no kernels")
        return
    others = sum(event.self_device_time_total for event in kernels if not _PRODUCTS.search(event.key))
    launches = sum(event.count for event in kernels)
    found.figure(f"{what}: kernels that are no matrix product, convolution or attention", 100 * others / total, "%",
                 f"of {total / 1e3:.1f} ms in {launches} kernels; a step takes {seconds * 1e3:.1f} ms")
    for event in kernels[:MOST_EXPENSIVE]:
        found.note(f"{what}: {event.self_device_time_total / 1e3:.2f} ms in {event.count} x {event.key[:110]}")
