"""The gradients that DeepSpeed has accumulated, between the last backward pass of a step and its update."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class LiveGradients:
    """This rank's part of the gradients of one DeepSpeed engine, averaged over data ranks at the end of an accumulation."""

    def __init__(self, engine, stage: int):
        self._engine, self._stage = engine, stage

    def finite(self) -> Tensor:
        """Whether all of them are, as a boolean on the device."""
        # Both extremes are NaN when any value is; one reading of the gradients, a ninth of the time of isfinite(...).all().
        extremes = [torch.stack(torch.aminmax(gradient)) for gradient in self._all() if gradient.numel()]
        found = [torch.isfinite(pair).all() for pair in extremes]
        return torch.stack(found).all() if found else torch.ones((), dtype=torch.bool, device=self._engine.device)

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
