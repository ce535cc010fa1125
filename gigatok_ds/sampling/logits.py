"""Choosing one code from logits: temperature, top-k, top-p, then a draw with a number that belongs to the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gigatok_ds.errors import InputError
from gigatok_ds.streams import numpy_stream

FAILED = -1  # instead of a code


class Choice(NamedTuple):
    """How a code is chosen. top_k 0 and top_p 1 keep everything; top_k 1 is greedy and needs no numbers."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (B, vocab) with everything below the k-th largest removed; ties with it are kept."""
    threshold = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < threshold, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus filtering (Holtzman et al. 2019, arXiv:1904.09751): the smallest set of codes whose probability
    exceeds p, including the code that crosses it."""
    ordered, order = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    removed = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before > p)
    return logits.masked_fill(removed, float("-inf"))


def uniform_numbers(seed: int, images: Sequence[int], count: int) -> Tensor:
    """`count` uniform numbers in [0, 1) for each image, float64 (images, count): a stream of (seed, image number)."""
    return torch.from_numpy(np.stack([numpy_stream(seed, "sampling", image).random(count) for image in images]))


def choose_codes(logits: Tensor, uniform: Tensor, choice: Choice) -> Tensor:
    """Logits (B, vocab) and uniform numbers in [0, 1), float64 (B,), to codes (B,).

    The code at which the cumulative distribution passes the number, in float64: each row is drawn by itself. A row
    whose logits are not finite gets FAILED, a mark that the host need not read before the end: see `as_tokens` and
    `refuse_failed`. Nothing depends on a value that the host would have to read.
    """
    if choice.top_k == 1:
        likeliest, code = logits.max(-1)
        return code.masked_fill(~likeliest.isfinite(), FAILED)
    logits = logits / max(choice.temperature, 1e-5)
    if choice.top_k > 0:
        logits = keep_top_k(logits, choice.top_k)
    if choice.top_p < 1:
        logits = keep_top_p(logits, choice.top_p)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    code = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return code.masked_fill(~cumulative[:, -1].isfinite(), FAILED)


def as_tokens(codes: Tensor) -> Tensor:
    """Codes to go on with: any code for one that failed, so that nothing outside the vocabulary is looked up."""
    return codes.clamp(min=0)


def refuse_failed(codes: Tensor, images: Sequence[int]) -> None:
    """Raise InputError naming the first position at which a sequence of codes (B, T) failed, and the likely causes.

    The one reading of the device for all codes.
    """
    rows, places = (codes == FAILED).nonzero(as_tuple=True)
    if len(rows):
        place = int(places.min())
        image = images[int(rows[places.argmin()])]
        raise InputError(f"the logits of code {place} of image {image} are not finite (of {len(rows.unique())} of "
                         f"{len(codes)} images): the GPT's weights hold NaN or infinite values, or its type overflows; "
                         "convert it again from a checkpoint that learns, or take --dtype bfloat16 or float32")
