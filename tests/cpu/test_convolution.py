"""3x3 convolutions against torch's in float64; where Winograd's transform is used, and where not."""

import pytest
import torch
import torch.nn.functional as F
from rank_runs import run_ranks
from torch import Tensor, nn
from training_runs import prepare

from gigatok_ds.config.deepspeed import resolve_deepspeed, zero_settings
from gigatok_ds.config.load import load_recipe
from gigatok_ds.cpu import winograd
from gigatok_ds.cpu.convolution import WinogradConv2d, use_winograd
from gigatok_ds.cpu.winograd import has_winograd

needs_kernels = pytest.mark.skipif(not has_winograd(torch.ones(1)), reason="no native kernels")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


def layer(in_channels: int = 64, out_channels: int = 64, **options) -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(in_channels, out_channels, 3, **{"padding": 1} | options)
    use_winograd(conv)
    return conv


def plain(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, padding=1)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def with_gradients(conv: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and of its product with some map the gradients at x, weight and bias."""
    x = x.clone().requires_grad_()
    conv.zero_grad()
    y = conv(x)
    (y * draw(*y.shape).to(y.dtype)).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in conv.parameters())]


@needs_kernels
@pytest.mark.parametrize("batch, in_channels, out_channels, height, width",
                         [(1, 64, 64, 32, 32), (1, 64, 192, 65, 70), (3, 128, 64, 64, 64), (1, 65, 67, 128, 32)])
def test_training_agrees_with_float64(batch, in_channels, out_channels, height, width):
    conv, x = layer(in_channels, out_channels), draw(batch, in_channels, height, width)
    reference = nn.Conv2d(in_channels, out_channels, 3, padding=1, dtype=torch.float64)
    reference.load_state_dict(conv.state_dict())
    found, expected = with_gradients(conv, x), with_gradients(reference, x.double())
    assert not torch.equal(found[0], plain(conv, x))  # or this test is not of Winograd's transform
    assert [relative(*pair) < 5e-6 for pair in zip(found, expected, strict=True)] == [True] * 4


@needs_kernels
def test_the_same_bits_every_time():
    conv, x = layer(), draw(2, 64, 32, 32)
    assert all(map(torch.equal, with_gradients(conv, x), with_gradients(conv, x)))


@needs_kernels
def test_a_batch_is_its_images():
    conv, x = layer(), draw(3, 64, 32, 32)
    assert torch.equal(conv(x), torch.cat([conv(image) for image in x.split(1)]))


@needs_kernels
def test_frozen_inputs_and_weights_get_no_gradient():
    conv, x = layer(), draw(1, 64, 32, 32)
    conv(x).sum().backward()
    assert x.grad is None and conv.weight.grad is not None
    conv.requires_grad_(False).zero_grad()
    x.requires_grad_()
    conv(x).sum().backward()
    assert x.grad is not None and conv.weight.grad is None


def in_evaluation(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    return conv.eval()(x), plain(conv, x)


def with_few_channels(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    conv = layer(64, 63)
    return conv(x), plain(conv, x)


def with_many_filters(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    conv, x = layer(256, 1025), draw(1, 256, 32, 32)
    return conv(x), plain(conv, x)


def of_a_small_map(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x[:, :, 1:]
    return conv(x), plain(conv, x)


def in_float64(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    return conv.double()(x.double()), plain(conv, x.double())


def in_autocast(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return conv(x), plain(conv, x)


@pytest.mark.parametrize("options",
                         [{"stride": 2}, {"padding": 0}, {"dilation": 2}, {"groups": 2}, {"padding_mode": "circular"}])
def test_other_kinds_of_convolutions_stay_what_they_are(options):
    assert isinstance(layer(), WinogradConv2d) and type(layer(**options)) is nn.Conv2d


@pytest.mark.parametrize("case",
                         [in_evaluation, with_few_channels, with_many_filters, of_a_small_map, in_float64, in_autocast])
def test_elsewhere_it_is_torchs_own(case):
    found, expected = case(layer(), draw(1, 64, 32, 32))
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_without_the_kernels_it_is_torchs_own(monkeypatch):
    monkeypatch.setattr(winograd, "has_winograd", lambda like: False)
    conv, x = layer(), draw(1, 64, 32, 32)
    assert torch.equal(conv(x), plain(conv, x))


def kinds_of_convolutions(recipe):
    from gigatok_ds.parallel.topology import start_process_group
    from gigatok_ds.training import tokenizer_task

    settings, _ = resolve_deepspeed(zero_settings(1), recipe, data_parallel_size=1)
    topology = start_process_group()
    images = tokenizer_task.TokenizerTask.open_data(recipe, topology, settings)
    task = tokenizer_task.TokenizerTask(recipe, topology, settings, images)
    layers = [module for module in task.generator.network.modules() if isinstance(module, nn.Conv2d)]
    return {(type(layer).__name__, layer.kernel_size, layer.stride) for layer in layers}


def test_a_tokenizer_that_trains_on_a_cpu_has_them(tmp_path):
    recipe = load_recipe(tmp_path / "tokenizer.yaml", prepare(tmp_path)["tokenizer"])
    (kinds,) = run_ranks(kinds_of_convolutions, 1, recipe)
    assert ("WinogradConv2d", (3, 3), (1, 1)) in kinds and ("Conv2d", (3, 3), (1, 1)) not in kinds
