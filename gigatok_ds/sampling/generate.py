"""The decoding loop.

An image's codes are a function of the model, its class, the settings and (seed, image number): its draws are a stream
of its own. Its logits must not depend on its company either. On a CPU in float32 they do not (see cpu/packed_gpt.py);
elsewhere they may differ in the last bits between numbers of rows, so a sampler fills every batch up to the same
number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gigatok_ds.cpu.packed_gpt import with_steady_rows
from gigatok_ds.errors import InputError
from gigatok_ds.models.gpt import GPT, Modulations
from gigatok_ds.sampling.cache import DynamicKVCache
from gigatok_ds.sampling.guidance import guidance_scales, guide
from gigatok_ds.sampling.logits import Choice, as_tokens, choose_codes, refuse_failed, uniform_numbers
from gigatok_ds.sampling.static import StaticDecoder


def without_autocast(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The method with autocast off: weights and caches have one type, and products of a few rows kernels of their own.
    """
    @functools.wraps(method)
    def plain(self, *arguments, **options):
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *arguments, **options)

    return plain


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What codes are drawn by. Raises InputError for what no model can be sampled with.

    cfg_scale: of classifier-free guidance; above 1, each step runs the conditional and the unconditional sequence in
    one batch, and the first code is fully guided whatever the schedule, which cfg_schedule and cfg_schedule_kwargs say
    (see `guidance_scales`). cfg_interval: no guidance after decoding step n, counted from 0 after the first code (-1:
    guided throughout). temperature, top_k, top_p: see Choice.
    """

    cfg_scale: float = 1.0
    cfg_schedule: str = "constant"
    cfg_schedule_kwargs: dict | None = None
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        self.scales(2)
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; it must be a finite number of at least 0")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (off) or a positive whole number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be in (0, 1]")

    @property
    def choice(self) -> Choice:
        return Choice(self.temperature, self.top_k, self.top_p)

    def scales(self, length: int) -> list[float]:
        """The guidance scale of each of so many codes."""
        return guidance_scales(length, self.cfg_scale, self.cfg_schedule, self.cfg_schedule_kwargs, self.cfg_interval)


class Sampler:
    """Draws codes with one model, up to `batch_size` sequences at a time.

    On a GPU each step, the choice of the codes included, is a CUDA graph (see static.py), unless tensor ranks share the
    layers. With `compile` the network's step is compiled by torch.compile when first needed, which takes a minute; on a
    CPU it is slower than the plain one (benchmarks/sampling.py). `compile` moves logits in the last bits: it is a
    setting, like the type of the weights.
    """

    def __init__(self, gpt: GPT, batch_size: int, *, compile: bool = False):
        _check_batch_size(batch_size)
        self.gpt, self.batch_size = gpt, batch_size
        self.device = gpt.norm.weight.device
        eager, fewest = (gpt, None) if compile else with_steady_rows(gpt)
        # Whether batches are filled up, so that codes may depend on batch_size in near-ties.
        self.fills = fewest is None
        self.fewest = fewest or batch_size
        full = isinstance(gpt.output, nn.Linear)  # and not one of tensor ranks
        self.decoder: StaticDecoder | EagerDecoder
        if compile or (full and self.device.type == "cuda"):
            self.decoder = StaticDecoder(gpt, batch_size, compile=compile)
        else:
            self.decoder = EagerDecoder(eager)

    @torch.no_grad()
    @without_autocast
    def codes(self, classes: Tensor, images: Sequence[int], *, seed: int = 0, **settings: Any) -> Tensor:
        """Codes (B, T) int64 of the images with these classes (B,) and numbers. `settings`: see Sampling."""
        sampling = Sampling(**settings)
        _check_classes(self.gpt, classes)
        length, count, images = self.gpt.config.sequence_length, len(classes), list(images)
        assert count == len(images) <= self.batch_size
        scales = sampling.scales(length)
        if count == 0:
            return torch.empty(0, length, dtype=torch.long, device=self.device)
        surplus = max(self.fewest - count, 0)
        filled = torch.cat([classes, classes[-1:].expand(surplus)]).to(self.device)
        uniform = uniform_numbers(seed, images + images[-1:] * surplus, length).to(self.device)
        was_training = self.gpt.training
        self.gpt.eval()
        try:
            drawn = self.decoder.draw(filled, uniform, scales, sampling.choice)[:count]
        finally:
            self.gpt.train(was_training)
        refuse_failed(drawn, images)
        return drawn


class EagerDecoder:
    """Steps of the model as it is, with caches that grow."""

    def __init__(self, gpt: GPT):
        self.gpt = gpt

    def draw(self, classes: Tensor, uniform: Tensor, scales: Sequence[float], choice: Choice) -> Tensor:
        """As `StaticDecoder.draw`, of any number of sequences."""
        chosen, nobody = classes, torch.full_like(classes, self.gpt.unconditional_class)
        # After the last guided code the conditional half goes on alone.
        guided = max((place + 1 for place, scale in enumerate(scales) if scale > 1), default=0)
        codes = []
        for position, scale in enumerate(scales):
            other = nobody if position == 0 else chosen
            logits = self.step(torch.cat([chosen, other]) if position < guided else chosen, position)
            logits = guide(logits, scale) if scale > 1 else logits[: len(chosen)]
            codes.append(choose_codes(logits, uniform[:, position], choice))
            chosen = as_tokens(codes[-1])
        return torch.stack(codes, dim=1)

    def step(self, tokens: Tensor, position: int) -> Tensor:
        """Logits (B, vocab) of the code after `position`. The first position starts anew; later ones may drop rows."""
        if position == 0:
            self.caches = [DynamicKVCache(self.gpt.config.sequence_length) for _ in self.gpt.layers]
            self.modulations = self.gpt.modulations(tokens)
        for cache in self.caches:
            cache.position = position
        return self.gpt.decode_step(tokens, position, self.caches, _rows(self.modulations, len(tokens)))


def _rows(modulations: Modulations, count: int) -> Modulations:
    """Those of the first sequences."""
    return [None if part is None else part[:count] for part in modulations]


def check_numbers(*, batch_size: int | None = None, **settings: Any) -> None:
    """InputError for settings that no model can be sampled with (see Sampling), before one is loaded."""
    if batch_size is not None:
        _check_batch_size(batch_size)
    Sampling(**settings)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")


def _check_classes(gpt: GPT, classes: Tensor) -> None:
    if classes.ndim != 1 or classes.is_floating_point():
        raise InputError(f"classes must be a one-dimensional integer tensor; got {tuple(classes.shape)} "
                         f"{classes.dtype}")
    gpt.check_classes(classes)


def generate(gpt: GPT, classes: Tensor, *, images: Sequence[int] | None = None, seed: int = 0, compile: bool = False,
             **settings) -> Tensor:
    """Sample one sequence of codes for each class, in one batch. Returns codes (B, T) int64.

    classes (B,) integers; the class num_classes means "no class". `images` (default: 0 to B - 1) are the numbers that,
    with `seed`, address each sequence's draws. `settings` are those of Sampling. Whoever draws many batches keeps a
    `Sampler`. Raises InputError for arguments out of range, and for logits that are not finite. Computes in the type of
    the GPT's weights, whatever torch.autocast says.
    """
    classes = torch.as_tensor(classes)
    if classes.shape == (0,):  # of an empty list torch makes fractions
        classes = classes.long()
    images = list(range(len(classes)) if images is None else images)
    if len(images) != len(classes):
        raise InputError(f"there are {len(classes)} classes and {len(images)} image numbers; give each class a number")
    return Sampler(gpt, max(len(classes), 1), compile=compile).codes(classes, images, seed=seed, **settings)
