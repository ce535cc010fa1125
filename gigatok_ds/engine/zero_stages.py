"""Where DeepSpeed keeps float32 weights and gradients at each ZeRO stage: a class for each kind of stage.

All that depends on the stage once an engine is built, and all inner names of DeepSpeed's optimizers (0.19.8), are here.
DeepSpeed's public `safe_get_local_*` serve stage 3 only, copy what is offloaded to the device, and know no state of
Adam's before its first update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from gigatok_ds.parallel.topology import Topology


class Place(NamedTuple):
    """Where elements `start` to `start + size` of a flattened parameter are: from `offset` on in the flattened
    `holder`.

    The holder is float32, what the optimizer updates and what it keeps its state for.
    """

    holder: Tensor
    offset: int
    start: int
    size: int

    def view(self, tensor: Tensor) -> Tensor:
        """The elements (size,) within the holder or a tensor like it."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.size)


class ZeroStage(ABC):
    """One DeepSpeed engine's weights and gradients, as its stage shares them out over data ranks."""

    holders_replicated: bool  # Data ranks hold the same float32 weights and moments.
    parameters_replicated: bool  # Data ranks hold the same parameters, of which the holders are parts.

    def __init__(self, engine: Any, topology: Topology):
        self.engine, self.topology = engine, topology
        self.optimizer = engine.optimizer
        self.network: nn.Module = engine.module
        self.trained = {name: parameter for name, parameter in self.network.named_parameters()
                        if parameter.requires_grad}

    def places(self, *, share: bool) -> dict[str, Place]:
        """Each trained parameter of which this rank holds something, by name.

        share: of what all data ranks hold, count an equal share each.
        """
        found = {name: self._place(parameter, share) for name, parameter in self.trained.items()}
        return {name: place for name, place in found.items() if place is not None and place.size > 0}

    @abstractmethod
    def _place(self, parameter: Any, share: bool) -> Place | None:
        """The place of a parameter, to which DeepSpeed has attached things; None if no element is on this rank."""

    @abstractmethod
    def calls(self) -> list[tuple[Sequence[Tensor], Sequence[nn.Parameter]]]:
        """What each call of the optimizer in an update, in order, is handed: holders, and the parameters of which the
        holders of all ranks are parts."""

    @abstractmethod
    def refresh(self) -> None:
        """Make what the network computes with, of whichever precision, out of the float32 weights again."""

    @abstractmethod
    def gradients(self) -> Iterator[Tensor]:
        """This rank's part of the accumulated gradients, averaged over data ranks at the end of an accumulation."""

    @abstractmethod
    def named_gradients(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        """The same without padding, each with its parameter; where nothing is offloaded, and before stage 3."""

    @abstractmethod
    def sum_over_parts(self, value: Tensor) -> None:
        """Sum in place over the ranks that hold different gradients. Collective."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Forget what has been accumulated, as after an update."""


class Unpartitioned(ZeroStage):
    """Stage 0: every data rank holds everything; in low precision, the optimizer holds float32 copies."""

    holders_replicated, parameters_replicated = True, False

    def __init__(self, engine: Any, topology: Topology):
        super().__init__(engine, topology)
        self._masters = {id(low): full for low, full in self._copies()}

    def _place(self, parameter: Any, share: bool) -> Place:
        holder = self._masters.get(id(parameter), parameter)
        if not share:
            return Place(holder, 0, 0, holder.numel())
        size = -(-holder.numel() // self.topology.data_size)
        start = self.topology.data_rank * size
        return Place(holder, start, start, min(size, holder.numel() - start))

    def calls(self) -> list[tuple[Sequence[Tensor], Sequence[nn.Parameter]]]:
        parameters = list(self.trained.values())
        return [([self._masters.get(id(parameter), parameter) for parameter in parameters], parameters)]

    def _copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter in low precision, and its float32 copy."""
        for lows, fulls in zip(getattr(self.optimizer, "fp16_groups", []), getattr(self.optimizer, "fp32_groups", []),
                               strict=False):
            yield from zip(lows, fulls, strict=False)

    def refresh(self) -> None:
        for low, full in self._copies():
            low.data.copy_(full.data)

    def gradients(self) -> Iterator[Tensor]:
        return (gradient for gradient, _ in self.named_gradients())

    def named_gradients(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        return ((parameter.grad, parameter) for parameter in self.network.parameters() if parameter.grad is not None)

    def sum_over_parts(self, value: Tensor) -> None:
        if self.topology.tensor_size > 1:
            dist.all_reduce(value, group=self.topology.tensor_group)

    def drop_gradients(self) -> None:
        self.engine.zero_grad()


class _Partitioned(ZeroStage):
    """Stages 1 to 3: each data rank's optimizer holds flat float32 partitions of its own."""

    holders_replicated = False

    @abstractmethod
    def _partitions(self) -> list[Tensor]:
        """The flat partitions, in float32, group by group."""

    @abstractmethod
    def _groups(self) -> list[list[nn.Parameter]]:
        """The parameters of which the flat partitions are parts."""

    @abstractmethod
    def _offloaded(self) -> bool: ...

    @abstractmethod
    def _drop_on_device(self) -> None: ...

    def calls(self) -> list[tuple[Sequence[Tensor], Sequence[nn.Parameter]]]:
        return [([partition], group) for partition, group in zip(self._partitions(), self._groups(), strict=True)]

    def gradients(self) -> Iterator[Tensor]:
        if self._offloaded():
            yield from (partition.grad for partition in self._partitions() if partition.grad is not None)
        else:
            for group in self.optimizer.averaged_gradients.values():
                yield from (gradient for gradient in group or () if gradient is not None)

    def sum_over_parts(self, value: Tensor) -> None:
        self.topology.sum_over_ranks(value)

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self._offloaded():
            self.optimizer.reset_cpu_buffers()
        else:
            self._drop_on_device()


class PartitionedOptimizer(_Partitioned):
    """Stages 1 and 2: partitions of what the optimizer holds, and whole parameters everywhere."""

    parameters_replicated = True

    def _partitions(self) -> list[Tensor]:
        partitions: list[Tensor] = self.optimizer.single_partition_of_fp32_groups
        return partitions

    def _groups(self) -> list[list[nn.Parameter]]:
        groups: list[list[nn.Parameter]] = self.optimizer.bit16_groups
        return groups

    def _offloaded(self) -> bool:
        return bool(self.optimizer.cpu_offload)

    def _place(self, parameter: Any, share: bool) -> Place | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        here = mapping.hp_fragment_address
        return Place(self._partitions()[mapping.param_group_index], here.start, mapping.lp_fragment_address.start,
                     here.numel)

    def refresh(self) -> None:
        self.optimizer.update_lp_params()

    def named_gradients(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        for group, parameters in enumerate(self.optimizer.params_in_partition):
            gradients = [gradient for gradient in self.optimizer.averaged_gradients[group]
                         if not getattr(gradient, "_zero_padding", False)]
            yield from zip(gradients, parameters, strict=False)

    def _drop_on_device(self) -> None:
        self.optimizer._release_preflattened_grad_buffers()
        for group in self.optimizer.averaged_gradients:
            self.optimizer.averaged_gradients[group] = None
            self.optimizer.all_grad_tensors[group] = None


class PartitionedParameters(_Partitioned):
    """Stage 3: parameters are partitioned, too, and are empty shells between their uses."""

    parameters_replicated = False

    def _partitions(self) -> list[Tensor]:
        partitions: list[Tensor] = self.optimizer.fp32_partitioned_groups_flat
        return partitions

    def _groups(self) -> list[list[nn.Parameter]]:
        groups: list[list[nn.Parameter]] = self.optimizer.fp16_groups
        return groups

    def _offloaded(self) -> bool:
        return bool(self.optimizer.offload_optimizer)

    def _place(self, parameter: Any, share: bool) -> Place:
        group, offset, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start = self.topology.data_rank * size
        size = min(size, parameter.ds_numel - start)  # what is beyond pads the last ranks' partitions
        return Place(self._partitions()[group], offset, start, size)

    def refresh(self) -> None:
        optimizer = self.optimizer
        optimizer.checkpoint_event_prologue()
        for full, low, parameters in zip(self._partitions(), optimizer.fp16_partitioned_groups_flat,
                                         optimizer.fp16_partitioned_groups, strict=False):
            low.data.copy_(full.data)
            for parameter, values in zip(parameters, optimizer.unflatten(low, parameters), strict=False):
                parameter.data = values.data
        optimizer.checkpoint_event_epilogue()

    def named_gradients(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        raise NotImplementedError("at stage 3 DeepSpeed computes the norm")

    def drop_gradients(self) -> None:
        super().drop_gradients()
        self.optimizer.inf_or_nan_tracker.zero_()  # what the next overflow check would still see

    def _drop_on_device(self) -> None:
        self.optimizer.averaged_gradients = {}


def zero_stage(engine: Any, stage: int, topology: Topology) -> ZeroStage:
    """The adapter of a DeepSpeed engine at this ZeRO stage."""
    kinds: dict[int, Callable[[Any, Topology], ZeroStage]] = {
        0: Unpartitioned, 1: PartitionedOptimizer, 2: PartitionedOptimizer, 3: PartitionedParameters}
    return kinds[stage](engine, topology)


def shape_on_this_rank(parameter: nn.Parameter) -> list[int]:
    """A parameter's shape on this tensor rank; at stage 3 the parameter itself is an empty shell."""
    return list(getattr(parameter, "ds_shape", parameter.shape))
