"""The sampler: codes per second beside a direct key/value-cache loop, equal codes, and codes that do not depend on the
batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import sampling
import torch

from acceptance.findings import Findings
from acceptance.section import Setting
from gigatok_ds.config.model import GPTConfig, TransformerSize
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.sampling.generate import EagerDecoder, Sampler
from gigatok_ds.sampling.static import StaticDecoder

IMAGES, SCALE, FEW = 32, 4.0, 3
DIRECT_STEPS = 64  # of the direct loop, which is the same at all positions


@torch.no_grad()
def run(setting: Setting, found: Findings) -> None:
    on_gpu = setting.on_gpu
    small = GPTConfig(size=TransformerSize(width=64, layers=2, heads=2), vocab_size=256, sequence_length=16,
                      num_classes=10)
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


def _ways(gpt: GPT, images: int, setting: Setting) -> Iterator[tuple[str, Callable[[], Sampler], float]]:
    """Ours, each with the seconds that it needs at least: step by step as the model is, and on a GPU as a CUDA graph.
    """
    def eager() -> Sampler:
        sampler = Sampler(gpt, images)
        if isinstance(sampler.decoder, StaticDecoder):
            sampler.decoder = EagerDecoder(gpt)
        return sampler

    yield "ours, eager", eager, 1
    if setting.on_gpu:
        yield "ours, a CUDA graph", lambda: Sampler(gpt, images), 3
        yield "ours, a CUDA graph of compiled steps", lambda: Sampler(gpt, images, compile=True), 15


def _equal_codes(name: str, gpt: GPT, setting: Setting, found: Findings) -> None:
    """In float32: every way against the first, and a few images drawn alone against the same ones among others."""
    images = 8 if setting.quick else IMAGES
    classes, expected = torch.arange(images) % gpt.config.num_classes, None
    for way, build, seconds in _ways(gpt, images, setting):
        if not found.has_time(f"{name}, codes of {way}", seconds):
            continue
        sampler = build()
        codes = sampler.codes(classes, range(images), cfg_scale=SCALE)
        alone = sampler.codes(classes[:FEW], range(FEW), cfg_scale=SCALE)
        found.check(f"{name}, {way}: codes do not depend on the batch", torch.equal(alone, codes[:FEW]),
                    f"{FEW} alone and among {images}")
        if expected is None:
            expected = codes
            continue
        same = (codes == expected).float().mean().item()
        found.check(f"{name}, {way}: the codes of the eager way", same >= 0.99,
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
    for way, build, least in _ways(gpt, images, setting):
        if not found.has_time(f"{name}, {kind}, {way}", least):
            continue
        draw = partial(build().codes, classes, range(images), cfg_scale=SCALE)
        rate = images * length / _timed(draw, setting)
        found.figure(f"{name}, {kind}, {way}", rate, "codes/s", f"{rate / reference:.2f} x the direct loop")


def _timed(function: Callable[[], object], setting: Setting) -> float:
    """Seconds of the second call."""
    function()
    setting.synchronise()
    start = time.perf_counter()
    function()
    setting.synchronise()
    return time.perf_counter() - start
