"""The sampler: codes per second beside a direct key/value-cache loop, equal codes, and codes that do not depend on the batch."""

from __future__ import annotations

import time

import sampling
import torch

from acceptance.findings import Findings
from acceptance.section import Setting
from gigatok_ds.config.model import GPTConfig, TransformerSize
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.sampling.generate import Sampler

IMAGES, SCALE, FEW = 32, 4.0, 3
DIRECT_STEPS = 64  # of the direct loop, which is the same at all positions


@torch.no_grad()
def run(setting: Setting, found: Findings) -> None:
    on_gpu = setting.on_gpu
    small = GPTConfig(size=TransformerSize(width=64, layers=2, heads=2), vocab_size=256, sequence_length=16, num_classes=10)
    models = {"a small GPT": small} if setting.quick else {name: GPTConfig(size=name) for name in ("GPT-B", "GPT-XL")}
    for name, config in models.items():
        if not found.has_time(name, 15 if on_gpu else 1):
            continue
        gpt = initialise_(GPT(config), seed=0)
        torch.nn.init.normal_(gpt.output.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        gpt = gpt.to(setting.device).eval().requires_grad_(False)
        _equal_codes(name, gpt, setting, found)
        gpt = gpt.to(torch.bfloat16) if on_gpu else gpt
        _speed(name, gpt, setting, found)


def _equal_codes(name: str, gpt: GPT, setting: Setting, found: Findings) -> None:
    """In float32: the graph against the eager decoder, and a few images drawn alone against the same ones among others."""
    images = 8 if setting.quick else IMAGES
    classes = torch.arange(images) % gpt.config.num_classes
    plain = Sampler(gpt, images)
    codes = plain.codes(classes, range(images), cfg_scale=SCALE)
    alone = plain.codes(classes[:FEW], range(FEW), cfg_scale=SCALE)
    found.check(f"{name}: codes do not depend on the batch", torch.equal(alone, codes[:FEW]), f"{FEW} alone and among {images}")
    if setting.on_gpu and found.has_time(f"{name}: codes of the CUDA graph", 15):
        captured = Sampler(gpt, images, compile=True).codes(classes, range(images), cfg_scale=SCALE)
        same = (captured == codes).float().mean().item()
        found.check(f"{name}: the CUDA graph draws the same codes", same >= 0.99,
                    f"{same:.2%} in float32; sums in another order may turn a near-tie, and what follows it")


def _speed(name: str, gpt: GPT, setting: Setting, found: Findings) -> None:
    images = 4 if setting.quick else IMAGES
    kind = str(gpt.norm.weight.dtype).removeprefix("torch.")
    direct, length = sampling.Direct(gpt, images), gpt.config.sequence_length
    chosen = direct.step(torch.arange(images, device=setting.device) % gpt.config.num_classes, 0)
    steps = min(DIRECT_STEPS, length - 1)
    seconds = _timed(lambda: [direct.step(chosen, position) for position in range(1, steps + 1)], setting)
    reference = images * steps / seconds
    found.figure(f"{name}, {kind}, direct loop", reference, "codes/s", f"{images} images with guidance")
    classes = torch.arange(images) % gpt.config.num_classes
    for compile in (False, True) if setting.on_gpu else (False,):
        what = f"{name}, {kind}, ours{' as a CUDA graph' if compile else ', eager'}"
        if compile and not found.has_time(what, 10):
            continue
        sampler = Sampler(gpt, images, compile=compile)
        rate = images * length / _timed(lambda: sampler.codes(classes, range(images), cfg_scale=SCALE), setting)
        found.figure(what, rate, "codes/s", f"{rate / reference:.2f} x the direct loop")


def _timed(function, setting: Setting) -> float:
    """Seconds of the second call."""
    function()
    setting.synchronise()
    start = time.perf_counter()
    function()
    setting.synchronise()
    return time.perf_counter() - start
