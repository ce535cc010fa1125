"""Tables of positions for another number of them: what a model knows of places carries over to a finer or coarser grid,
and to more or fewer latent tokens.

Grids are resized bicubically, as Vision Transformers' are (Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.2).
Latent tokens whose queries are pooled at several levels, coarse to fine (models.latent_encoder), keep their levels;
finer ones are interpolated from the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gigatok_ds.config.model import GPTConfig, TokenizerConfig

_GRIDS = ("encoder.positional_embedding", "decoder.positional_embedding", "decoder.q_2d")
_TOKENS = ("encoder.latent_token_positional_embedding", "decoder.latent_token_positional_embedding", "encoder.query_1d")


class Resized(NamedTuple):
    """A table for other positions, and in words what was done."""

    table: Tensor
    how: str


def resizable(config: TokenizerConfig | GPTConfig) -> Mapping[str, str]:
    """How each table of positions of a model is resized, by its name: "grid", "levels" or "linear"; a GPT's first row,
    the class's, stays.
    """
    if isinstance(config, GPTConfig):
        return {"positional_embedding": "levels"} if config.positions == "learned" else {}
    grids = dict.fromkeys(_GRIDS, "grid")
    if config.layout == "2d":
        return grids
    return grids | dict.fromkeys(_TOKENS, "levels" if config.latent_query == "multi_level" else "linear")


def resize(table: Tensor, rows: int, how: str, *, keep: int = 0) -> Resized | None:
    """A table (N, ..., W) for `rows` positions instead, all but the first `keep` of which are resized; None if they are
    no grid on one of both sides. In float32, whatever it is resized in.
    """
    fixed, moving = table[:keep], table[keep:].float()
    shape, wanted = moving.shape[1:], rows - keep
    flat = moving.flatten(1)
    if how == "levels" and not (_is_power(len(flat)) and _is_power(wanted)):
        how = "linear"
    if how == "grid":
        before, after = math.isqrt(len(flat)), math.isqrt(wanted)
        if before**2 != len(flat) or after**2 != wanted:
            return None
        resized = resized_grid(flat, (before, before), (after, after))
        said = f"{before} x {before} positions become {after} x {after}, bicubically"
    elif how == "levels":
        resized = _by_level(flat, wanted)
        said = (f"{len(flat)} latent tokens become {wanted}: " + (
            "the finer levels are left out" if wanted < len(flat) else "finer levels are interpolated from the last"))
    else:
        resized = F.interpolate(flat.t()[None], wanted, mode="linear", align_corners=False)[0].t()
        said = f"{len(flat)} latent tokens become {wanted}, linearly"
    return Resized(torch.cat([fixed.float(), resized.reshape(wanted, *shape)]).to(table.dtype), said)


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def level_shape(level: int) -> tuple[int, int]:
    """Rows and columns of the cells of a level: levels 0 and 1 have one, each later one twice as many."""
    splits = max(level - 1, 0)
    return 2 ** (splits // 2), 2 ** ((splits + 1) // 2)


def _by_level(flat: Tensor, wanted: int) -> Tensor:
    """The first levels of (N, W), N and `wanted` powers of two, and finer ones made of the last there is."""
    if wanted <= len(flat):
        return flat[:wanted]
    last = len(flat).bit_length() - 1
    rows, columns = level_shape(last)
    finest = flat[-rows * columns :]
    finer = [resized_grid(finest, (rows, columns), level_shape(level))
             for level in range(last + 1, wanted.bit_length())]
    return torch.cat([flat, *finer])


def resized_grid(flat: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Values (R * C, W) of the cells of a grid, row by row, for one of other numbers of rows and columns."""
    grid = flat.t().reshape(1, -1, *before)
    return F.interpolate(grid, after, mode="bicubic", antialias=True, align_corners=False)[0].flatten(1).t()
