"""The gradients that DeepSpeed has accumulated, between the last backward pass of a step and its update."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from gigatok_ds.parallel.topology import Topology


class LiveGradients:
    """This rank's part of the gradients of one DeepSpeed engine, averaged over data ranks at the end of an
    accumulation.
    """

    def __init__(self, engine, stage: int, topology: Topology):
        self._engine, self._stage, self._topology = engine, stage, topology
        if getattr(getattr(engine.optimizer, "loss_scaler", None), "raise_error_at_min_scale", False):
            # How many steps in a row may be left out is the step guard's to say, in one line.
            engine.optimizer.loss_scaler.raise_error_at_min_scale = False

    def finite(self) -> Tensor:
        """Whether all of them are, as a boolean on the device."""
        found = [gradient for gradient in self._all() if gradient.numel()]
        if not found:
            return torch.ones((), dtype=torch.bool, device=self._engine.device)
        if found[0].device.type == "cpu":
            # Both extremes are NaN when any value is; one reading of the gradients, a sixth of the time of a norm.
            return torch.stack([extreme for gradient in found for extreme in torch.aminmax(gradient)]).isfinite().all()
        return torch.stack(torch._foreach_norm(found, math.inf)).isfinite().all()

    def norm(self) -> Tensor:
        """Their global 2-norm at stages 0 to 2, a float32 scalar on the device; replicas count once. Collective."""
        counted = list(self._counted())
        squares = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        if counted:
            squares += torch.stack(torch._foreach_norm(counted, 2, torch.float32)).double().square().sum()
        if self._stage > 0:
            self._topology.sum_over_ranks(squares)
        elif self._topology.tensor_size > 1:
            dist.all_reduce(squares, group=self._topology.tensor_group)
        return squares.sqrt().float()

    def _counted(self) -> Iterator[Tensor]:
        """Without what another tensor rank counts."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            pairs = [(parameter.grad, parameter) for parameter in self._engine.module.parameters()
                     if parameter.grad is not None]
        else:
            pairs = [pair for group, parameters in enumerate(optimizer.params_in_partition)
                     for pair in zip(self._without_padding(optimizer.averaged_gradients[group]), parameters,
                                     strict=False)]
        for gradient, parameter in pairs:
            if self._topology.tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False):
                yield gradient

    @staticmethod
    def _without_padding(gradients: list[Tensor]) -> list[Tensor]:
        return [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]

    def drop(self) -> None:
        """Forget them, as after an update, and count the step as one that was left out."""
        engine, optimizer = self._engine, self._engine.optimizer
        if self._stage == 0:
            engine.zero_grad()
        else:
            optimizer.zero_grad(set_to_none=True)
            self._drop_partitions(optimizer)
        engine.losses = None
        engine.micro_steps += 1
        engine.global_steps += 1
        engine.skipped_steps += 1
        engine.global_samples += engine.train_batch_size()

    def _all(self) -> Iterator[Tensor]:
        optimizer = self._engine.optimizer
        if self._stage == 0:
            yield from (parameter.grad for parameter in self._engine.module.parameters() if parameter.grad is not None)
        elif self._offloaded():
            masters = (optimizer.fp32_partitioned_groups_flat if self._stage == 3
                       else optimizer.single_partition_of_fp32_groups)
            yield from (master.grad for master in masters if master.grad is not None)
        else:
            for group in optimizer.averaged_gradients.values():
                yield from (gradient for gradient in group or () if gradient is not None)

    def _offloaded(self) -> bool:
        optimizer = self._engine.optimizer
        return optimizer.offload_optimizer if self._stage == 3 else optimizer.cpu_offload

    def _drop_partitions(self, optimizer) -> None:
        if self._offloaded():
            optimizer.reset_cpu_buffers()
        elif self._stage == 3:
            optimizer.averaged_gradients = {}
        else:
            optimizer._release_preflattened_grad_buffers()
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None
        if self._stage == 3:  # what the next overflow check would still see
            optimizer.inf_or_nan_tracker.zero_()
