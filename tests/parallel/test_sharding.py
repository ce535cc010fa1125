"""Cutting and joining are inverse, packed groups stay together per rank, and both kinds of layers declare alike."""

import pytest
import torch
from small_models import small_gpt, small_tokenizer

from gigatok_ds.parallel.sharding import TensorShard, declared_shards


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("shard", [TensorShard(), TensorShard(dim=1), TensorShard(groups=3)])
def test_join_undoes_cut(shard, size):
    full = torch.randn(24, 8)
    parts = [shard.shard(full, rank, size) for rank in range(size)]
    assert torch.equal(shard.unshard(parts), full)
    assert shard.full_shape(parts[0].shape, size) == [24, 8]


def test_each_rank_holds_a_slice_of_every_packed_group():
    q, k, v = torch.zeros(4, 2), torch.ones(4, 2), torch.full((4, 2), 2.0)
    part = TensorShard(groups=3).shard(torch.cat([q, k, v]), rank=1, size=2)
    assert part[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_every_projection_and_table_of_the_transformers_is_declared():
    for network in (small_gpt(), small_tokenizer()):
        shards = declared_shards(network)
        blocks = {name for name, p in network.named_parameters()
                  if p.ndim == 2 and (".transformer." in name or name.startswith("layers."))}
        assert blocks and blocks <= shards.keys()
    assert declared_shards(small_gpt())["layers.0.attention.wqkv.weight"] == TensorShard(groups=3)
    assert declared_shards(small_gpt())["tok_embeddings.weight"] == TensorShard()
    assert declared_shards(small_gpt())["layers.1.feed_forward.w2.weight"] == TensorShard(dim=1)
