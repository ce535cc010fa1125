"""Group norm and SiLU in one: values and gradients against float64 autograd, memory layout, and what is kept."""

import pytest
import torch
import torch.nn.functional as F

from gigatok_ds.models.cnn_blocks import ResidualBlock, depth_to_space
from gigatok_ds.models.group_norm import GroupNormSiLU, _NormSiLU

EPS = 1e-6
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values_and_gradients(function, x, weight, bias, upstream):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, upstream)


def expected(x, weight, bias, upstream):
    def apart(x, weight, bias):
        return F.silu(F.group_norm(x, 4, weight, bias, EPS))

    return values_and_gradients(apart, x, weight, bias, upstream)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, mean, tolerance", [
    (torch.float64, 2, 1e-12), (torch.float32, 2, 1e-5), (torch.float32, 2000, 2e-4), (torch.bfloat16, 2, 3e-2)])
def test_it_is_silu_of_the_norm(layout, dtype, mean, tolerance):
    if mean == 2000 and layout == torch.channels_last:
        pytest.skip("far from zero torch's own kernel for this layout loses the variance")
    x, weight, bias, upstream = 3 * draw((2, 8, 5, 6), 0) + mean, draw(8, 1), draw(8, 2), draw((2, 8, 5, 6), 3)
    # What is given in dtype is what float64 is given, too.
    x, weight, bias, upstream = (tensor.to(dtype) for tensor in (x, weight, bias, upstream))
    x = x.contiguous(memory_format=layout)

    def run(x, weight, bias):
        return _NormSiLU.apply(x, weight, bias, 4, EPS)

    ours = values_and_gradients(run, x, weight, bias, upstream)
    theirs = expected(*(tensor.double() for tensor in (x, weight, bias, upstream)))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - other).abs().max() <= tolerance * other.abs().max()
    assert all(mine.is_contiguous(memory_format=layout) for mine in ours[:2])


def test_the_module_is_a_group_norm_to_those_who_look():
    module = GroupNormSiLU(4, 8, eps=EPS)
    assert module.state_dict().keys() == torch.nn.GroupNorm(4, 8).state_dict().keys()
    x = draw((1, 8, 3, 3), 0).float()
    torch.testing.assert_close(module(x), F.silu(F.group_norm(x, 4, eps=EPS)))


def test_a_residual_block_keeps_the_layout_and_four_maps():
    """The inputs of two norms and of two convolutions; the first of these is the block's own input."""
    block = ResidualBlock(32, 32)
    x = draw((1, 32, 16, 16), 0).float().contiguous(memory_format=torch.channels_last).requires_grad_()
    kept = {}

    def keep(tensor):
        return kept.setdefault(tensor.data_ptr(), tensor)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = block(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert sum(tensor.numel() == x.numel() for tensor in kept.values()) == 4
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_depth_to_space_is_onnxs_dcr_order(layout):
    x = torch.arange(2 * 8 * 3 * 5).view(2, 8, 3, 5).contiguous(memory_format=layout)
    y = depth_to_space(x)
    assert y.is_contiguous(memory_format=layout)
    for c in range(2):
        for row in range(6):
            for column in range(10):
                source = x[:, (2 * (row % 2) + column % 2) * 2 + c, row // 2, column // 2]
                assert torch.equal(y[:, c, row, column], source)
