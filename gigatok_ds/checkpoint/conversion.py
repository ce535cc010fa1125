"""One model from where it is to where others read it: a standalone directory, or an original `.pt`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from gigatok_ds.checkpoint.model_sources import Model, open_model, open_original
from gigatok_ds.checkpoint.original import save_original
from gigatok_ds.checkpoint.standalone import CONFIG_FILE, damaged_weights, save_standalone
from gigatok_ds.checkpoint.tensor_files import LazyTensors, shapes_of
from gigatok_ds.checkpoint.verification import training_outputs, verify
from gigatok_ds.errors import InputError

logger = logging.getLogger(__name__)


class Converted(NamedTuple):
    """Where a model was written, and what was compared of it, in words, if anything was."""

    path: Path
    verified: str = ""


def convert(model: Model, out: Path, *, to: Literal["standalone", "original"] = "standalone",
            dtype: torch.dtype = torch.float32, verified: bool = False, overwrite: bool = False) -> Converted:
    """Write a model that `open_model` has opened.

    dtype is that of the parameters. verified: what was written is read again and compared, every tensor and the outputs
    of both models, before it takes its place. overwrite: replace `out` if it is of the same kind and holds nothing
    else. Raises InputError for a damaged source, for an `out` that is not to be replaced, and at a difference; `out` is
    then as it was.
    """
    found: list[str] = []

    def check(aside: Path) -> None:
        if verified:
            found.append(_compared(model, aside, out, to, dtype))

    if verified and model.place:
        _refuse_damaged(model.place)  # before anything is written
    with shown(model.weights) as weights:
        if to == "original":
            path = save_original(out, model.config, weights, dtype=dtype, overwrite=overwrite, check=check)
        else:
            path = save_standalone(out, model.config, weights, provenance=model.provenance, classes=model.classes,
                                   dtype=dtype, overwrite=overwrite, check=check)
    return Converted(path, *found)


@contextmanager
def shown(weights: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """The weights, showing on a terminal how many of them were read, and telling of those that are not numbers."""
    broken: dict[str, None] = {}
    with tqdm(total=len(weights), unit="tensor", disable=None) as bar:
        def read(name: str) -> Tensor:
            bar.update()
            value = weights[name]
            # Both extremes are NaN when any value is.
            if value.is_floating_point() and value.numel() and not torch.stack(value.aminmax()).isfinite().all():
                broken[name] = None
            return value

        yield LazyTensors(shapes_of(weights), read)
    if broken:
        logger.warning("%d tensors hold values that are not finite, the first of them %s; what this model computes "
                       "will not be finite either", len(broken), next(iter(broken)))


def _compared(model: Model, aside: Path, out: Path, to: str, dtype: torch.dtype) -> str:
    """What was compared of what was written `aside`, which has not taken its place at `out` yet."""
    try:
        _refuse_damaged(aside)
        written = open_original(aside, model.config) if to == "original" else open_model(aside)
        return verify(model, written, dtype=dtype, probe=training_outputs(model, dtype))
    except InputError as error:
        raise InputError(str(error).replace(str(aside), str(out))) from None


def _refuse_damaged(place: Path) -> None:
    """Standalone weights that are not as they were written; runs are compared when they are opened."""
    if (place / CONFIG_FILE).is_file() and (problem := damaged_weights(place)):
        raise InputError(f"{problem}; copy or convert it again")
