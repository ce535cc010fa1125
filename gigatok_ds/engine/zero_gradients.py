"""The gradients that DeepSpeed has accumulated, between the last backward pass of a step and its update."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gigatok_ds.engine.zero_stages import ZeroStage


class LiveGradients:
    """This rank's part of the gradients of one DeepSpeed engine, averaged over data ranks at the end of an
    accumulation.
    """

    def __init__(self, zero: ZeroStage):
        self._zero, self._engine = zero, zero.engine

    def finite(self) -> Tensor:
        """Whether all of them are, as a boolean on the device."""
        found = [gradient for gradient in self._zero.gradients() if gradient.numel()]
        if not found:
            return torch.ones((), dtype=torch.bool, device=self._engine.device)
        if found[0].device.type == "cpu":
            # Both extremes are NaN when any value is; one reading of the gradients, a sixth of the time of a norm.
            return torch.stack([extreme for gradient in found for extreme in torch.aminmax(gradient)]).isfinite().all()
        return torch.stack(torch._foreach_norm(found, math.inf)).isfinite().all()

    def norm(self) -> Tensor:
        """Their global 2-norm at stages 0 to 2, a float32 scalar on the device; replicas count once. Collective."""
        # Of what tensor ranks hold alike the first counts.
        counted = [gradient for gradient, parameter in self._zero.named_gradients()
                   if self._zero.topology.tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False)]
        squares = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        if counted:
            squares += torch.stack(torch._foreach_norm(counted, 2, torch.float32)).double().square().sum()
        self._zero.sum_over_parts(squares)
        return squares.sqrt().float()

    def drop(self) -> None:
        """Forget them, as after an update, and count the step as one that was left out."""
        self._zero.drop_gradients()
        engine = self._engine
        engine.losses = None
        engine.micro_steps += 1
        engine.global_steps += 1
        engine.skipped_steps += 1
        engine.global_samples += engine.train_batch_size()
