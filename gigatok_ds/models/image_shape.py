"""Images of another height and width than a tokenizer was made for: the CNN takes any, positions are interpolated."""

from __future__ import annotations

from torch import nn

from gigatok_ds.errors import InputError
from gigatok_ds.models.positions import resizable, resized_grid
from gigatok_ds.models.tokenizer import Tokenizer


def set_image_shape(tokenizer: Tokenizer, height: int, width: int) -> None:
    """Have a tokenizer take and return images (B, 3, height, width) from now on, in place.

    The positions of its grids are interpolated bicubically. Latent tokens stay as many as they are in the 1-D layout;
    in the 2-D layout there is one for each cell. Raises InputError unless both sides are multiples of a cell.
    """
    config = tokenizer.config
    cell, before = config.image_size // config.grid, tokenizer.decoder.grid
    if min(height, width) < cell or height % cell or width % cell:
        near = " x ".join(str(max(round(side / cell), 1) * cell) for side in (height, width))
        raise InputError(f"images of {height} x {width} cannot be cut into this tokenizer's cells of {cell} x {cell} "
                         f"pixels; the nearest size is {near}")
    after = height // cell, width // cell
    for name, how in resizable(config).items():
        place, _, parameter = name.rpartition(".")
        owner = tokenizer.get_submodule(place)
        if how == "grid" and (table := getattr(owner, parameter, None)) is not None:
            resized = resized_grid(table.detach().float().flatten(1), before, after).to(table.dtype)
            setattr(owner, parameter, nn.Parameter(resized.reshape(-1, *table.shape[1:]), table.requires_grad))
    tokenizer.decoder.grid, tokenizer.image_shape = after, (height, width)
