"""Megatron-core: its process groups, and its tensor-parallel layers behind `Layers`.

The only file that imports Megatron.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gigatok_ds.compat import current_device_without_gpus, without_wandb

with without_wandb():
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import mappings

from gigatok_ds.parallel.cross_entropy import head_cross_entropy, join_over
from gigatok_ds.parallel.layers import REPLICATED_REGION, TensorParallelLayers
from gigatok_ds.parallel.partial import mark_partial_parameter
from gigatok_ds.parallel.reduce import RankMean
from gigatok_ds.parallel.sharding import TensorShard, column_shards, row_shards, vocab_shards

current_device_without_gpus()


def start_groups(tensor_size: int) -> None:
    """Split the ranks into tensor groups of `tensor_size` neighbours and data groups across them."""
    parallel_state.initialize_model_parallel(tensor_size, create_gloo_process_groups=False)


def stop_groups() -> None:
    parallel_state.destroy_model_parallel()


class DeepSpeedTopology:
    """What DeepSpeed asks of an `mpu`, answered by Megatron-core; to DeepSpeed "model" parallel means tensor."""

    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        return torch.distributed.get_process_group_ranks(parallel_state.get_data_parallel_group())


class _Declared:
    """Says how parameters are cut, to us and to DeepSpeed, and leaves no placeholders in state_dicts."""

    # Nothing for compilers: products whose gradients are sent while others are computed, from within autograd's
    # functions.
    outside_graphs = True

    _load_state_dict_pre_hooks: dict[int, Callable[..., Any]]  # of nn.Module

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def _declare(self, shards: dict[str, TensorShard]) -> None:
        self.shards = shards
        for name, shard in shards.items():
            # DeepSpeed counts a parameter once per tensor rank in the gradient norm only if it carries this mark.
            parameter = getattr(self, name)
            parameter.tensor_model_parallel = True
            parameter.partition_dim, parameter.partition_stride = shard.dim, 1
        self._load_state_dict_pre_hooks.clear()


class ColumnLinear(_Declared, tensor_parallel.ColumnParallelLinear):
    """(..., in) to this rank's part of the output features."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, groups: int, config: ModelParallelConfig):
        super().__init__(in_features, out_features, config=config, init_method=_nothing, bias=bias, gather_output=False)
        self._declare(column_shards(bias=bias, groups=groups))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class RowLinear(_Declared, tensor_parallel.RowParallelLinear):
    """This rank's part of the input features to all output features, summed over tensor ranks."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, config: ModelParallelConfig):
        super().__init__(in_features, out_features, config=config, init_method=_nothing, bias=bias,
                         input_is_parallel=True, skip_bias_add=False)
        self._declare(row_shards())
        if bias and config.sequence_parallel:
            mark_partial_parameter(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class VocabEmbedding(_Declared, tensor_parallel.VocabParallelEmbedding):
    """Token embeddings; this rank holds a range of the vocabulary."""

    def __init__(self, vocab_size: int, width: int, *, config: ModelParallelConfig):
        super().__init__(vocab_size, width, init_method=_nothing, config=config)
        self._declare(vocab_shards())


class MegatronVocabHead(ColumnLinear):
    """This rank's range of the vocabulary: its logits, or the cross-entropy over all of it."""

    def __init__(self, width: int, vocab_size: int, *, config: ModelParallelConfig):
        super().__init__(width, vocab_size, bias=False, groups=1, config=config)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return super().forward(x)
        # Each rank adds its codes' share to the gradient of x.
        enter = (mappings.gather_from_sequence_parallel_region if self.sequence_parallel
                 else mappings.copy_to_tensor_model_parallel_region)
        first = parallel_state.get_tensor_model_parallel_rank() * self.output_size_per_partition
        return head_cross_entropy(enter(x), self.weight, targets - first,
                                  join=join_over(parallel_state.get_tensor_model_parallel_group()))


def _nothing(_: Tensor) -> None:
    """Initial weights are addressed by name and set later; see models.initialisation."""


class _TensorRanks:
    """The region along the first axis between a tensor that is alike on all tensor ranks and their parts of it."""

    def scatter(self, full: Tensor) -> Tensor:
        return mappings.scatter_to_sequence_parallel_region(full)

    def gather(self, part: Tensor) -> Tensor:
        # What follows is computed alike on all tensor ranks, so each takes its part of the gradient unsummed.
        return mappings.gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=False)

    def copy(self, full: Tensor) -> Tensor:
        return mappings.copy_to_tensor_model_parallel_region(full)


class MegatronLayers(TensorParallelLayers):
    """`Layers` over the current tensor-parallel group."""

    images = _TensorRanks()

    def __init__(self, *, sequence_parallel: bool = False):
        super().__init__(parallel_state.get_tensor_model_parallel_rank(),
                         parallel_state.get_tensor_model_parallel_world_size(), sequence_parallel=sequence_parallel)
        self.tokens = _TensorRanks() if sequence_parallel else REPLICATED_REGION
        self.config = ModelParallelConfig(
            tensor_model_parallel_size=self.tensor_parallel_size,
            sequence_parallel=sequence_parallel,
            use_cpu_initialization=not torch.cuda.is_available(),
            perform_initialization=False,
        )

    def column(self, in_features: int, out_features: int, *, bias: bool, groups: int = 1) -> ColumnLinear:
        return ColumnLinear(in_features, out_features, bias=bias, groups=groups, config=self.config)

    def row(self, in_features: int, out_features: int, *, bias: bool) -> RowLinear:
        return RowLinear(in_features, out_features, bias=bias, config=self.config)

    def vocab_embedding(self, vocab_size: int, width: int) -> VocabEmbedding:
        return VocabEmbedding(vocab_size, width, config=self.config)

    def vocab_head(self, width: int, vocab_size: int) -> MegatronVocabHead:
        return MegatronVocabHead(width, vocab_size, config=self.config)

    def full_features(self, part: Tensor) -> Tensor:
        return mappings.gather_from_tensor_model_parallel_region(part)

    def mean_over_data(self, x: Tensor) -> Tensor:
        return self._mean(parallel_state.get_data_parallel_group())(x)

    def image_mean(self, *, all_data: bool) -> RankMean:
        group = torch.distributed.group.WORLD if all_data else parallel_state.get_tensor_model_parallel_group()
        return self._mean(group)

    @staticmethod
    def _mean(group: torch.distributed.ProcessGroup | None) -> RankMean:
        assert group is not None, "no process group"
        return RankMean(group, torch.distributed.get_world_size(group))
