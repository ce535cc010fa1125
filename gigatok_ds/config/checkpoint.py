"""How often a run is saved, and which of its checkpoints stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gigatok_ds.config.model import at_least
from gigatok_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """A checkpoint after every `every` steps and after the last.

    Of them stay the newest `keep`; those whose step is a multiple of `keep_every` (null: none for that); and the
    `keep_best` best by the validation figure `best_metric` (such as psnr or loss), of which the `best` is best. With
    `asynchronous` training goes on as soon as the state is copied to host memory, and a thread writes it.
    """

    every: int = 5000
    keep: int = 10
    keep_every: int | None = None
    keep_best: int = 0
    best_metric: str | None = None
    best: Literal["lowest", "highest"] = "lowest"
    asynchronous: bool = False

    def __post_init__(self) -> None:
        at_least(1, "checkpoint", every=self.every, keep=self.keep, keep_every=self.keep_every)
        at_least(0, "checkpoint", keep_best=self.keep_best)
        if (self.keep_best > 0) != (self.best_metric is not None):
            raise InputError(f"checkpoint.keep_best is {self.keep_best} and checkpoint.best_metric is "
                             f"{self.best_metric}; they go together: set both, or leave out both")
        if self.keep_every is not None and self.keep_every % self.every:
            raise InputError(
                f"checkpoint.keep_every is {self.keep_every}; it must be a multiple of checkpoint.every, which "
                f"is {self.every}"
            )
