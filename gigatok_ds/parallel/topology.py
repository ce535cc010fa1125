"""Who am I among the ranks: the process groups, and this rank's place in them.

Ranks are counted tensor-first: neighbours share a model's layers (a tensor group, inside one host), and those with the
same place in their tensor groups share the data (a data group, across hosts).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gigatok_ds.cluster.launched import launched_rank
from gigatok_ds.cluster.share import Share
from gigatok_ds.errors import InputError
from gigatok_ds.parallel import flight_recorder
from gigatok_ds.parallel.cuda_queues import order_kernels
from gigatok_ds.parallel.layers import PLAIN, Layers, PlainLayers
from gigatok_ds.parallel.reduce import RankMean

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Topology:
    """This process's rank and device, and its groups.

    Data ranks choose samples; the tensor ranks of a data rank share its samples. `mpu` is what DeepSpeed asks about
    tensor parallelism, None without.
    """

    rank: int
    world_size: int
    device: torch.device
    data_rank: int
    data_size: int
    tensor_rank: int = 0
    tensor_size: int = 1
    data_group: Any = None
    tensor_group: Any = None
    mpu: Any = None
    layers: Layers = field(default=PLAIN)

    @property
    def is_first(self) -> bool:
        """The rank that writes logs and metadata."""
        return self.rank == 0

    @property
    def data_share(self) -> Share:
        """This data rank's of the samples of a batch."""
        return Share(rank=self.data_rank, size=self.data_size)

    @property
    def image_share(self) -> Share:
        """This rank's of the images of a batch: a data rank's tensor ranks, which are neighbours, share its samples in
        their order.
        """
        return Share(rank=self.rank, size=self.world_size)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def gather_data(self, tensor: Tensor) -> Tensor:
        """Concatenate equally shaped tensors of all data ranks along the first axis, in rank order."""
        return _gather(tensor, self.data_group, self.data_size)

    def gather_images(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensor ranks' shares of a data rank's batch; no gradient passes."""
        return _gather(tensor, self.tensor_group, self.tensor_size)

    def own_images(self, tensor: Tensor) -> Tensor:
        """This tensor rank's share, along the first axis, of what belongs to a data rank's batch."""
        return tensor.chunk(self.tensor_size)[self.tensor_rank]

    def mean_over_ranks(self, tensor: Tensor) -> Tensor:
        """Mean over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def exchange(self, tensor: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send each rank, in rank order, so many elements of a flat tensor; returns what all ranks sent to this one."""
        if self.world_size == 1:
            return tensor
        found = tensor.new_empty(sum(received))
        dist.all_to_all_single(found, tensor, received, sent)
        return found

    def max_over_ranks(self, value: float) -> float:
        if self.world_size == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return float(box)

    def from_first(self, value: Any) -> Any:
        """The first rank's `value` (any plain Python object) on every rank; what others pass does not matter."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: Value) -> list[Value]:
        """Every rank's `value` (any plain Python object), in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found


def single_process(device: torch.device | str = "cpu") -> Topology:
    """The layout of a process on its own, without a process group."""
    return Topology(rank=0, world_size=1, device=torch.device(device), data_rank=0, data_size=1)


def _gather(tensor: Tensor, group: Any, size: int) -> Tensor:
    if size == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)


def check_layout(world_size: int, local_size: int, tensor_size: int) -> None:
    """InputError when tensor groups do not fill the ranks, or would reach from one host to another."""
    if world_size % tensor_size:
        raise InputError(f"parallel.tensor is {tensor_size}, which does not divide the {world_size} ranks of this job; "
                         "start a multiple of it, or choose another size")
    if local_size % tensor_size:
        raise InputError(f"parallel.tensor is {tensor_size}, but each host runs {local_size} ranks: a tensor group "
                         "must lie within one host; choose a size that divides the ranks of a host")


def start_process_group(*, tensor_size: int = 1, sequence_parallel: bool = False,
                        timeout: timedelta | None = None) -> Topology:
    """Join the process group that the launcher describes in the environment, or start one of a single process.

    NCCL on GPUs, gloo on CPUs; collectives may take `timeout` (None: torch's default). Raises InputError when
    `tensor_size` does not fit the ranks.
    """
    here = launched_rank()
    if not here.is_alone and not here.rendezvous:
        raise InputError(f"this is rank {here.rank} of {here.world_size}, but MASTER_ADDR and MASTER_PORT do not say "
                         "where ranks meet; set them, or unset RANK")
    check_layout(here.world_size, here.local_size, tensor_size)
    order_kernels(tensor_size)
    device = _device(here.local_rank)
    if not dist.is_initialized():
        flight_recorder.switch_on()
        backend = "nccl" if device.type == "cuda" else "gloo"
        # With its device NCCL connects at once, and not in the middle of the first step.
        device_id = device if device.type == "cuda" else None
        if here.rendezvous:
            dist.init_process_group(backend, timeout=timeout, device_id=device_id)
        else:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it even in a single process
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout,
                                    device_id=device_id)
    rank, world_size = dist.get_rank(), here.world_size
    if tensor_size > 1:
        return _tensor_parallel(rank, world_size, device, sequence_parallel, tensor_size)
    everybody = dist.group.WORLD
    layers = PlainLayers(RankMean(everybody, world_size)) if everybody is not None and world_size > 1 else PLAIN
    return Topology(rank=rank, world_size=world_size, device=device, data_rank=rank, data_size=world_size,
                    data_group=everybody, layers=layers)


def join_ranks(device: str, tensor_size: int = 1) -> Topology:
    """This process among those that the launcher started, as in training, or alone, without a process group.

    Raises InputError when several ranks would run on another kind of device.
    """
    if launched_rank().is_alone and tensor_size == 1:
        return single_process(device)
    topology = start_process_group(tensor_size=tensor_size)
    if topology.device.type != torch.device(device).type:
        raise InputError(f"--device is {device}, but several ranks run on {topology.device.type} here; choose that, or "
                         "hide the GPUs with CUDA_VISIBLE_DEVICES=")
    return topology


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # training's convolutions have the same shapes in every step
    return device


def _tensor_parallel(rank: int, world_size: int, device: torch.device, sequence_parallel: bool, size: int) -> Topology:
    try:
        from gigatok_ds.parallel import megatron
    except ImportError as error:
        raise InputError(f"parallel.tensor above 1 needs megatron-core, which cannot be imported ({error}); "
                         "pip install 'gigatok_ds[train]'") from error
    megatron.start_groups(size)
    mpu = megatron.DeepSpeedTopology()
    return Topology(
        rank=rank, world_size=world_size, device=device,
        data_rank=mpu.get_data_parallel_rank(), data_size=mpu.get_data_parallel_world_size(),
        tensor_rank=mpu.get_tensor_model_parallel_rank(), tensor_size=size,
        data_group=mpu.get_data_parallel_group(), tensor_group=mpu.get_tensor_model_parallel_group(),
        mpu=mpu, layers=megatron.MegatronLayers(sequence_parallel=sequence_parallel),
    )


def stop_process_group(topology: Topology) -> None:
    if topology.tensor_size > 1:
        from gigatok_ds.parallel import megatron

        megatron.stop_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
