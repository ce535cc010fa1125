"""Activation checkpointing: who recomputes, that it changes no number, and that it saves memory."""

import pytest
import torch
from small_models import small_gpt, small_tokenizer

from gigatok_ds.models.cnn_blocks import ResidualBlock
from gigatok_ds.parallel.dropout import dropout_at, name_dropouts
from gigatok_ds.parallel.recompute import recompute_


@pytest.mark.parametrize("every, blocks", [(0, 0), (1, 4), (2, 2), (3, 1), (4, 1), (5, 0)])
def test_every_nth_of_four_blocks_recomputes(every, blocks):
    assert recompute_(small_tokenizer(), every_block=every) == blocks


def test_the_cnn_recomputes_by_itself():
    tokenizer = small_tokenizer()
    residual_blocks = sum(isinstance(module, ResidualBlock) for module in tokenizer.modules())
    assert recompute_(tokenizer, cnn=True) == residual_blocks >= 8


def gradients(network, run):
    network.train()
    network.zero_grad()
    name_dropouts(network)
    with dropout_at(0, torch.tensor([1, 2])):
        run(network).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def saved_bytes(network, run):
    """Bytes that autograd keeps for the backward pass."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(network.train())
    return total


def gpt_loss(gpt):
    codes = torch.arange(16).view(2, 8)
    return gpt(codes[:, :-1], torch.tensor([0, 1]), codes).mean()


def tokenizer_loss(tokenizer):
    return tokenizer(torch.linspace(-1, 1, 1536).view(2, 3, 16, 16)).reconstruction.square().mean()


@pytest.mark.parametrize("build, run", [(small_gpt, gpt_loss), (small_tokenizer, tokenizer_loss)])
def test_gradients_stay_and_memory_shrinks(build, run):
    plain, recomputing = build(), build()
    recompute_(recomputing, every_block=1, cnn=build is small_tokenizer)
    expected = gradients(plain, run)
    for name, gradient in gradients(recomputing, run).items():
        assert torch.equal(gradient, expected[name]), name
    assert saved_bytes(recomputing, run) < 0.5 * saved_bytes(plain, run)
