"""LARS (You et al. 2017, arXiv:1708.03888) as linear probes are trained with since MoCo v3 and MAE."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """v = momentum v + s g; p = p - lr v.

    The trust ratio s is trust |p| / |g| for tensors of two or more dimensions (1 if either norm is 0), and 1 for
    others.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, *, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # torch's also takes a closure, which nobody here has
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if parameter.dim() > 1:
                    norm, gradient_norm = parameter.norm(), gradient.norm()
                    ratio = group["trust"] * norm / gradient_norm
                    gradient = gradient * torch.where((norm > 0) & (gradient_norm > 0), ratio, 1.0)
                velocity = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                velocity.mul_(group["momentum"]).add_(gradient)
                parameter.sub_(group["lr"] * velocity)
