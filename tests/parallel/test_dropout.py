"""Addressed dropout: right in number, the same wherever and in whatever parts it is computed."""

import hashlib

import numpy as np
import pytest
import torch

from gigatok_ds.cluster.share import Share
from gigatok_ds.kernels.dropout_mask import keep_mask, rule_of
from gigatok_ds.models.attention import MultiHeadAttention
from gigatok_ds.parallel.dropout import AttentionDropout, Dropout, MapDropout, dropout_at, name_dropouts
from gigatok_ds.parallel.layers import PLAIN

SAMPLES = torch.tensor([3, 2**33 + 1, 70, 71])


def mask(probability=0.1, seed=5, samples=SAMPLES, tokens=64, features=96):
    return keep_mask(torch.tensor(rule_of(seed, probability), dtype=torch.int32), samples,
                     torch.arange(tokens, dtype=torch.int32), torch.arange(features, dtype=torch.int32))


def mixed(x):
    """Of numbers without a sign, as written in 64 bits before this was pointwise code for compilers."""
    for factor in (0x7FEB352D, 0x846CA68B):
        x = (x ^ x >> np.uint64(16)) * np.uint64(factor) & np.uint64(0xFFFFFFFF)
    return x ^ x >> np.uint64(15)


def reference(probability, seed, samples, tokens, features):
    """The same masks in NumPy."""
    sample, token, feature = (numbers.numpy().astype(np.uint64) for numbers in (samples, tokens, features))
    row = sample * np.uint64(0x9E3779B1) + (sample >> np.uint64(32)) * np.uint64(0x85EBCA77) + np.uint64(seed)
    cell = mixed(mixed(row & np.uint64(0xFFFFFFFF)) + token[:, None] * np.uint64(0x85EBCA77) & np.uint64(0xFFFFFFFF))
    value = mixed(cell[..., None] ^ mixed(feature * np.uint64(0xC2B2AE3D) & np.uint64(0xFFFFFFFF)))
    # Compared after turning 2^31 to 0, as numbers with a sign are.
    return torch.from_numpy(((value + np.uint64(2**31)) % np.uint64(2**32)).astype(np.int64) >= int(probability
                                                                                                    * 2**32))


@pytest.mark.parametrize("seed", [5, 2**31 + 9, 2**32 - 1])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_masks_are_those_of_the_formula(probability, seed):
    samples = torch.cat([SAMPLES, torch.tensor([2**62 - 5, 2**31 + 7])])
    tokens, features = torch.arange(64) + 3, torch.arange(96) + 2**20
    rule = torch.tensor(rule_of(seed, probability), dtype=torch.int32)
    kept = keep_mask(rule, samples, tokens.int(), features.int())
    assert torch.equal(kept, reference(probability, seed, samples, tokens, features))


def test_masks_are_those_of_runs_before():
    """What is resumed goes on with the masks that it had."""
    assert (
        hashlib.sha256(mask(0.3).numpy().tobytes()).hexdigest()
        == "8b7e49698d48b824e40f6758feca8f7ba3619e04aa2b432f39ddd8c59b238cc9"
    )


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_for(probability):
    """Within 4.5 standard deviations of a binomial, overall and along each axis."""
    dropped = ~mask(probability, samples=torch.arange(32))
    for axes in ((0, 1, 2), (0, 1), (1, 2), (0, 2)):
        share = dropped.float().mean(axes)
        deviation = (probability * (1 - probability) / (dropped.numel() / share.numel())) ** 0.5
        assert ((share - probability).abs() < 4.5 * deviation).all(), axes


def test_neighbours_are_independent():
    """Correlation of a value's fate with that of the next along each axis, over 200,000 values."""
    kept = mask(0.5, samples=torch.arange(32)).float() - 0.5
    for axis in range(3):
        length = kept.shape[axis]
        products = kept.narrow(axis, 0, length - 1) * kept.narrow(axis, 1, length - 1)
        assert abs(products.mean().item()) * 4 < 4.5 / products.numel() ** 0.5


def test_another_seed_sample_or_layer_drops_others():
    for other in (mask(seed=6), mask(samples=SAMPLES + 1), mask(samples=SAMPLES + 2**32)):
        assert 0.1 < (mask() != other).float().mean() < 0.25  # 0.18 for independent masks


def test_parts_are_parts_of_the_whole():
    x = torch.ones(8, 4, 16)
    full = Dropout(0.3)
    tokens = [Dropout(0.3, tokens=Share(rank=rank, size=2)) for rank in range(2)]
    features = [Dropout(0.3, features=Share(rank=rank, size=2)) for rank in range(2)]
    for module in (full, *tokens, *features):
        name_dropouts(module)
    with dropout_at(0, SAMPLES):
        expected = full(x)
        assert torch.equal(torch.cat([tokens[rank](x[rank * 4 : rank * 4 + 4]) for rank in range(2)]), expected)
        assert torch.equal(torch.cat([part(x[..., :8]) for part in features], dim=-1), expected)
    with dropout_at(0, SAMPLES[2:]):
        assert torch.equal(full(x[:, 2:]), expected[:, 2:])
    assert expected.unique().tolist() == pytest.approx([0.0, 1 / 0.7])


def test_attention_heads_are_parts_of_the_whole():
    x = torch.ones(4, 6, 5, 40)
    full, *parts = AttentionDropout(0.3), *(AttentionDropout(0.3, heads=Share(rank=rank, size=3)) for rank in range(3))
    for module in (full, *parts):
        name_dropouts(module)
    with dropout_at(0, SAMPLES):
        expected = full(x)
        assert torch.equal(torch.cat([part(x[:, :2]) for part in parts], 1), expected)
    with dropout_at(0, SAMPLES[2:]):
        assert torch.equal(full(x[2:]), expected[2:])
    rows = expected.flatten(0, 2)
    assert len(rows.unique(dim=0)) == len(rows)
    assert expected.unique().tolist() == pytest.approx([0.0, 1 / 0.7])


def test_feature_maps_are_dropped_by_image_in_any_memory_layout():
    x = torch.rand(4, 16, 6, 5) + 1
    module = MapDropout(0.3)
    name_dropouts(module)
    with dropout_at(0, SAMPLES):
        expected = module(x)
        assert torch.equal(module(x.contiguous(memory_format=torch.channels_last)), expected)
    with dropout_at(0, SAMPLES, SAMPLES[1:3]):
        assert torch.equal(module(x[1:3]), expected[1:3]), "those of this rank's images"
    kept = expected != 0
    torch.testing.assert_close(expected[kept], x[kept] / 0.7)
    assert 0.6 < kept.float().mean() < 0.8 and len(kept.permute(0, 2, 3, 1).flatten(0, 2).unique(dim=0)) > 110


def test_attention_with_dropout_is_the_formula():
    """softmax(q k / sqrt(d)), dropped and scaled, times v, in float64, and its gradient."""
    torch.manual_seed(0)
    module = MultiHeadAttention(24, 3, PLAIN, dropout=0.4).double()
    name_dropouts(module)
    x = torch.randn(6, 4, 24, dtype=torch.float64, requires_grad=True)
    with dropout_at(0, SAMPLES):
        ours = module(x, x, x)
        mask = module.dropout(torch.ones(4, 3, 6, 6, dtype=torch.float64))
    assert 0.25 < (mask == 0).float().mean() < 0.55
    q, k, v = (torch.stack((x @ p.weight.T + p.bias).split(8, dim=2), 1) for p in
               (module.q_proj, module.k_proj, module.v_proj))  # (token, head, sample, feature)
    shares = torch.einsum("qhbd,khbd->bhqk", q, k).div(8**0.5).softmax(-1) * mask
    by_hand = torch.einsum("bhqk,khbd->qbhd", shares, v).flatten(2) @ module.out_proj.weight.T + module.out_proj.bias
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-6)  # probabilities are float32
    weights = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad((out * weights).sum(), x)[0] for out in (ours, by_hand)),
                               rtol=0, atol=1e-5)


def test_networks_beside_each_other_draw_masks_of_their_own():
    one, other = MapDropout(0.5), MapDropout(0.5)
    name_dropouts(one), name_dropouts(other, "perceptual")
    x = torch.ones(4, 16, 6, 5)
    with dropout_at(0, SAMPLES):
        assert not torch.equal(one(x), other(x))


def test_layers_draw_masks_of_their_own_and_evaluation_drops_nothing():
    network = torch.nn.Sequential(Dropout(0.5), Dropout(0.5))
    name_dropouts(network)
    x = torch.ones(8, 4, 16)
    with dropout_at(0, SAMPLES):
        assert not torch.equal(network[0](x), network[1](x))
        assert torch.equal(network.eval()(x), x)


def test_outside_of_an_address_it_is_torchs_own():
    torch.manual_seed(0)
    ours = Dropout(0.5)(torch.ones(100))
    torch.manual_seed(0)
    assert torch.equal(ours, torch.nn.functional.dropout(torch.ones(100), 0.5))
