"""The native Winograd convolution against float64, for every kind of processor and of map."""

import pytest
import torch
import torch.nn.functional as F

from gigatok_ds.cpu import winograd
from gigatok_ds.cpu.winograd import convolution, has_winograd, input_gradient, weight_gradient
from gigatok_ds.kernels import native

pytestmark = pytest.mark.skipif(not has_winograd(torch.ones(1)), reason="no native kernels")

SHAPES = [(1, 1, 1, 1, 1), (1, 3, 2, 4, 4), (2, 2, 5, 3, 9), (1, 4, 3, 17, 10), (3, 5, 4, 12, 7), (1, 2, 3, 5, 2050),
          (1, 3, 4, 130, 131)]


@pytest.fixture(params=["avx512", "avx2", "portable"])
def level(request, monkeypatch):
    monkeypatch.setenv("GIGATOK_CPU_CAPABILITY", request.param)
    try:
        torch.ops.gigatok_native.cpu_capability()
    except RuntimeError:
        pytest.skip(f"this processor has no {request.param}")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def exact(x, weight, bias, gradient):
    """The output and the gradients at x and at the weight, in float64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = F.conv2d(x, weight, None if bias is None else bias.double(), padding=1)
    return y.detach(), *torch.autograd.grad(y, [x, weight], gradient.double())


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within 5e-6 of the norm, and no element further than 1e-5 of the largest: the transform's constants go up to 8.
    """
    error = (found - expected).abs()
    return bool(error.norm() <= 5e-6 * expected.norm()) and bool(error.max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("batch, in_channels, out_channels, height, width", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_convolution(level, batch, in_channels, out_channels, height, width, with_bias):
    x, gradient = draw(batch, in_channels, height, width), draw(batch, out_channels, height, width)
    weight, bias = draw(out_channels, in_channels, 3, 3), draw(out_channels) if with_bias else None
    y, at_x, at_weight = exact(x, weight, bias, gradient)
    assert close(convolution(x, weight, bias), y)
    assert close(input_gradient(gradient, weight), at_x)
    assert close(weight_gradient(x, gradient), at_weight)


def test_any_memory_format():
    x, gradient, weight = draw(2, 8, 12, 20), draw(2, 4, 12, 20), draw(4, 8, 3, 3)
    turned = weight.transpose(0, 1).contiguous().transpose(0, 1)
    for moved in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(convolution(moved, turned, None), convolution(x, weight, None))
        assert torch.equal(weight_gradient(moved, gradient), weight_gradient(x, gradient))
    expanded = gradient[:, :, :1].expand(gradient.shape)
    assert torch.equal(weight_gradient(x, expanded), weight_gradient(x, expanded.contiguous()))
    assert torch.equal(input_gradient(expanded, turned), input_gradient(expanded.contiguous(), weight))


def test_how_many_tiles_at_a_time_changes_no_output(monkeypatch):
    x, gradient, weight = draw(1, 8, 40, 36), draw(1, 4, 40, 36), draw(4, 8, 3, 3)
    y, _, at_weight = exact(x, weight, None, gradient)
    for tiles in (1, 9, 20, 1000):
        monkeypatch.setattr(winograd, "_TILES", tiles)
        assert close(convolution(x, weight, None), y) and close(weight_gradient(x, gradient), at_weight)


def test_the_same_bits_every_time_and_of_tiles_for_any_number_of_threads():
    x, gradient, weight = draw(1, 64, 64, 64), draw(1, 64, 64, 64), draw(64, 64, 3, 3)
    tiles = torch.ops.gigatok_native.winograd_tiles
    threads, first, found = torch.get_num_threads(), torch.empty(36, 64, 256), torch.empty(36, 64, 256)
    tiles(first, x[0], 0, False)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            tiles(found, x[0], 0, False)
            assert torch.equal(found, first)
            once, again = ([convolution(x, weight, None), weight_gradient(x, gradient)] for _ in range(2))
            assert all(map(torch.equal, once, again))
    finally:
        torch.set_num_threads(threads)


def test_not_a_number_stays_in_its_neighbourhood():
    x, weight = draw(1, 3, 16, 16), draw(2, 3, 3, 3)
    x[0, 1, 9, 9] = float("nan")
    y = convolution(x, weight, None)
    assert y[0, :, 8:11, 8:11].isnan().all() and y[0, :, :4].isfinite().all() and y[0, :, :, :4].isfinite().all()


@pytest.mark.parametrize("tiles, maps, first, complaint", [
    ((36, 3, 4), (2, 8, 8), 0, "as many channels"), ((35, 2, 4), (2, 8, 8), 0, "36"),
    ((36, 2, 3), (2, 8, 8), 0, "whole rows"),
    ((36, 2, 4), (2, 8, 8), 1, "2 rows of tiles, not 1 and 2 more"), ((36, 2, 2), (2, 8, 8), -1, "2 rows of tiles"),
    ((36, 2, 2), (2, 8, 8), 2**63 - 1, "2 rows of tiles"), ((36, 2, 0), (2, 8, 8), 0, "contiguous and float32"),
    ((36, 2, 4), (2, 8, 0), 0, "contiguous and float32"), ((36, 8), (2, 8, 8), 0, r"\(36, C, T\)"),
])
def test_what_does_not_fit_is_refused(tiles, maps, first, complaint):
    kernels, tiles, maps = torch.ops.gigatok_native, torch.ones(tiles), torch.ones(maps)
    with pytest.raises(RuntimeError, match=complaint):
        kernels.winograd_tiles(tiles, maps, first, False)
    with pytest.raises(RuntimeError, match=complaint):
        kernels.winograd_maps(maps, tiles, first, None)


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda tensor: tensor.transpose(1, 2)])
def test_other_memory_is_refused(change):
    kernels, tiles, maps = torch.ops.gigatok_native, torch.ones(36, 4, 4), torch.ones(4, 8, 8)
    for call in (lambda: kernels.winograd_tiles(change(tiles), maps, 0, True),
                 lambda: kernels.winograd_tiles(tiles, change(maps), 0, True),
                 lambda: kernels.winograd_maps(maps, tiles, 0, torch.ones(3)),
                 lambda: kernels.winograd_maps(maps, tiles, 0, torch.ones(4).double())):
        with pytest.raises(RuntimeError, match="float32"):
            call()


def test_where_there_are_kernels(monkeypatch):
    assert has_winograd(torch.ones(1)) and not has_winograd(torch.ones(1).double())
    assert not has_winograd(torch.ones(1, device="meta"))
    monkeypatch.setenv("GIGATOK_KERNELS", "torch")
    assert native.kernels_on("cpu") is None and not has_winograd(torch.ones(1))
