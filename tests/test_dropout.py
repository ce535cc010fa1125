"""Addressed dropout: right in number, the same wherever and in whatever parts it is computed."""

import pytest
import torch

from gigatok_ds.parallel.dropout import Dropout, Part, dropout_at, keep_mask, name_dropouts

SAMPLES = torch.tensor([3, 2**33 + 1, 70, 71])


def mask(probability=0.1, seed=5, samples=SAMPLES, tokens=64, features=96):
    return keep_mask(probability, seed, samples, torch.arange(tokens), torch.arange(features))


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
    whole = Dropout(0.3)
    tokens = [Dropout(0.3, tokens=Part(rank=rank, size=2)) for rank in range(2)]
    features = [Dropout(0.3, features=Part(rank=rank, size=2)) for rank in range(2)]
    for module in (whole, *tokens, *features):
        name_dropouts(module)
    with dropout_at(0, SAMPLES):
        expected = whole(x)
        assert torch.equal(torch.cat([tokens[rank](x[rank * 4 : rank * 4 + 4]) for rank in range(2)]), expected)
        assert torch.equal(torch.cat([part(x[..., :8]) for part in features], dim=-1), expected)
    with dropout_at(0, SAMPLES[2:]):
        assert torch.equal(whole(x[:, 2:]), expected[:, 2:])
    assert expected.unique().tolist() == pytest.approx([0.0, 1 / 0.7])


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
