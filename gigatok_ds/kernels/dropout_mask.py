"""Which values an addressed dropout keeps.

A value is kept or not by a hash of its layer's key, its sample, token and feature: 32-bit numbers, whose products wrap
around. It is pointwise, which a compiler fuses into what is around it.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

# Odd constants of full length; multiplying by one and folding the high half down mixes 32 bits.
SAMPLE, TOKEN, FEATURE = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
MIX = (0x7FEB352D, 0x846CA68B)


def signed(number: int) -> int:
    """The int32 of the same bits as this number's low 32."""
    return (number + 2**31) % 2**32 - 2**31


def rule_of(key: int, probability: float) -> list[int]:
    """What decides in a layer, as four int32: its key, the threshold from which on hashes are kept, the bits of the
    float32 that those values are multiplied by, and a zero."""
    scale = struct.unpack("<i", struct.pack("<f", 1 / (1 - probability)))[0]
    return [signed(key), int(probability * 2**32) - 2**31, scale, 0]


def keep_mask(rule: Tensor, samples: Tensor, tokens: Tensor, features: Tensor) -> Tensor:
    """Whether to keep each of (T, B, W) values: bool, False with the rule's probability.

    samples (B,) int64, tokens (T,) and features (W,) int32 are numbers of what lies along the axes; for rule (4,) see
    `rule_of`.
    """
    low, high = samples.to(torch.int32), (samples >> 32).to(torch.int32)
    row = _mixed(low * signed(SAMPLE) + high * signed(TOKEN) + rule[0])
    cell = _mixed(row + tokens[:, None] * signed(TOKEN))
    return _mixed(cell[..., None] ^ _mixed(features * signed(FEATURE))) >= rule[1]


def _mixed(x: Tensor) -> Tensor:
    """A well-mixed int32 for each; shifts bring in zeros."""
    for factor in MIX:
        x = (x ^ (x >> 16 & 0xFFFF)) * signed(factor)
    return x ^ (x >> 15 & 0x1FFFF)


def dropped(x: Tensor, samples: Tensor, rule: Tensor, token: int, feature: int, per_sample: bool) -> Tensor:
    """x (T, B, W), each value zero or divided by 1 - probability, in the arithmetic of float32 at least.

    `token` and `feature` are the numbers of the first of each; with `per_sample` all of a sample shares the fate of
    those.
    """
    tokens, features = (1, 1) if per_sample else (x.shape[0], x.shape[2])
    kept = keep_mask(rule, samples, torch.arange(token, token + tokens, dtype=torch.int32, device=x.device),
                     torch.arange(feature, feature + features, dtype=torch.int32, device=x.device))
    return (x * (kept * rule[2].view(torch.float32))).to(x.dtype)
