"""How weights are updated: the optimizer, and the rates of a model's parts and layers beside the schedule's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from gigatok_ds.config.model import at_least, probability
from gigatok_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, Adam with the decay in the gradient, or Muon for matrices of transformer layers and AdamW for the rest.

    `decay` says what weight decay touches: everything, only tensors with two or more dimensions, or all but parameters
    with "norm" in their names. `part_lr` gives parts of the model (those of `training.freeze`) factors of the learning
    rate; `layerwise_lr` below 1 multiplies it once more for each layer between a layer and the last one. `momentum` is
    Muon's.
    """

    kind: Literal["adamw", "adam", "muon"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    decay: Literal["everything", "matrices", "not_norms"] = "everything"
    max_grad_norm: float = 10.0  # 0: no clipping
    momentum: float = 0.95
    layerwise_lr: float = 1.0
    part_lr: dict[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        at_least(0, "optimizer", lr=self.lr, eps=self.eps, weight_decay=self.weight_decay,
                 max_grad_norm=self.max_grad_norm)
        probability("optimizer", **{f"betas.{index}": beta for index, beta in enumerate(self.betas)})
        probability("optimizer", momentum=self.momentum)
        if self.kind != "muon" and self.momentum != OptimizerConfig.momentum:
            raise InputError(f"optimizer.momentum is {self.momentum}, but it does nothing with optimizer.kind "
                             f"{self.kind}, whose own is betas.0; leave it out, or set optimizer.kind to muon")
        if not 0 < self.layerwise_lr <= 1:
            raise InputError(f"optimizer.layerwise_lr is {self.layerwise_lr}; it must be above 0 and at most 1, which "
                             "is off")
        for part, factor in self.part_lr.items():
            if not 0 < factor < float("inf"):
                raise InputError(f"optimizer.part_lr.{part} is {factor}; it must be a number above 0; training.freeze "
                                 "leaves a part as it is")

    @property
    def of_discriminator(self) -> OptimizerConfig:
        """The same without what belongs to the parts and layers of the model: AdamW, instead of Muon."""
        kind = "adamw" if self.kind == "muon" else self.kind
        return replace(self, kind=kind, momentum=OptimizerConfig.momentum, layerwise_lr=1.0, part_lr={})


def check_rates(optimizer: OptimizerConfig, parts: Sequence[str], freeze: Sequence[str],
                before_last_layer: Sequence[str]) -> None:
    """InputError for rates of parts that the model does not have or that are frozen, and for layer-wise rates where
    nothing `before_last_layer` is trained."""
    for part in optimizer.part_lr:
        if part not in parts:
            raise InputError(f"optimizer.part_lr has {part!r}; parts of this model are {', '.join(parts)}")
        if part in freeze:
            raise InputError(f"optimizer.part_lr has {part}, which is not trained (training.freeze, or training.lora); "
                             "leave it out there, or train it")
    if optimizer.layerwise_lr < 1 and not set(before_last_layer) - set(freeze):
        raise InputError(f"optimizer.layerwise_lr is {optimizer.layerwise_lr}, but nothing that comes before the "
                         f"last layer ({', '.join(before_last_layer)}) is trained, so it does nothing; set it to 1")


def check_muon(optimizer: OptimizerConfig, precision: str, layered: Sequence[str], freeze: Sequence[str], *,
               adapters: bool = False) -> None:
    """InputError where Muon could not be right, or would have no matrices: those of `layered` parts are its."""
    if optimizer.kind != "muon":
        return
    if adapters:
        raise InputError("optimizer.kind is muon, but with training.lora the matrices of layers stay as they are; use "
                         "optimizer.kind adamw")
    if precision == "fp16":
        raise InputError("optimizer.kind is muon, but training.precision is fp16, in which it is not tested and its "
                         "products would overflow; use bf16 or fp32, or optimizer.kind adamw")
    if set(layered) <= set(freeze):
        raise InputError(f"optimizer.kind is muon, but training.freeze has {', '.join(layered)}, so there are no "
                         "matrices for it; use optimizer.kind adamw")
