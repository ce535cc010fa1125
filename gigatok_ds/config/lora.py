"""Low-rank adapters: parameter-efficient tuning of a trained GPT (LoRA: Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gigatok_ds.config.model import GPTConfig, at_least
from gigatok_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Of the GPT, whose own weights stay as they are, only adapters of `rank` beside the projections of `layers` are
    trained, and the parts of the model that `train` names. What adapters add is scaled by `alpha` / `rank`.
    """

    rank: int
    alpha: float
    layers: tuple[Literal["attention", "ffn"], ...] = ("attention", "ffn")
    train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least(1, "training.lora", rank=self.rank)
        if self.alpha <= 0:
            raise InputError(f"training.lora.alpha is {self.alpha}; it must be above 0, usually one or two times the "
                             "rank")
        if not self.layers:
            raise InputError("training.lora.layers is empty, so nothing has adapters; name attention, ffn or both")
        for name, given in (("layers", self.layers), ("train", self.train)):
            if len(set(given)) < len(given):
                raise InputError(f"training.lora.{name} is {list(given)}, which names a part twice; name each once")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def check_lora(lora: LoRAConfig, model: GPTConfig, freeze: Sequence[str]) -> None:
    """InputError for what a GPT cannot be tuned with."""
    whole = tuple(part for part in model.parts if part != "layers")
    for name in lora.train:
        if name == "layers":
            raise InputError("training.lora.train has 'layers', whose projections the adapters stand for; leave it "
                             "out, or set training.lora to null and train them themselves")
        if name not in whole:
            raise InputError(f"training.lora.train has {name!r}; parts of this model are {', '.join(whole)}")
    if freeze:
        raise InputError(f"training.freeze is {list(freeze)}, but with training.lora all parts are frozen that "
                         "training.lora.train does not name; leave training.freeze out")
    if lora.rank > model.transformer.width:
        raise InputError(f"training.lora.rank is {lora.rank}, but projections of this model are only "
                         f"{model.transformer.width} wide; choose a much smaller one, such as 8")
