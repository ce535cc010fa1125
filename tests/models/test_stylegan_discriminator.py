"""The StyleGAN discriminator and the blurs: sizes, names, arithmetic against a slow form, half precision."""

import pytest
import torch
import torch.nn.functional as F

from gigatok_ds.models.discriminators.blur import BinomialBlur
from gigatok_ds.models.discriminators.patchgan import PatchGAN
from gigatok_ds.models.discriminators.stylegan import StyleGANDiscriminator, channels_at


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def small(image_size=32):
    torch.manual_seed(0)
    return StyleGANDiscriminator(image_size, base_channels=4)


def slow_blur(x, row, stride, before):
    """Sums over a window of reflected indices."""
    row = torch.tensor(row, dtype=torch.float64) / sum(row)
    _, _, height, width = x.shape

    def reflected(index, size):
        index = abs(index)
        return index if index < size else 2 * (size - 1) - index

    rows = []
    for top in range(0, height, stride):
        values = [sum(a * b * x[:, :, reflected(top + i - before, height), reflected(left + j - before, width)].double()
                      for i, a in enumerate(row) for j, b in enumerate(row))
                  for left in range(0, width, stride)]
        rows.append(torch.stack(values, dim=-1))
    return torch.stack(rows, dim=-2).float()


@pytest.mark.parametrize("taps, stride, row, before", [(3, 1, [1, 2, 1], 1), (4, 2, [1, 3, 3, 1], 1)])
@pytest.mark.parametrize("height, width", [(8, 8), (7, 9), (5, 4)])
def test_a_blur_is_the_binomial_sum_over_reflected_pixels(taps, stride, row, before, height, width):
    x = random(2, 3, height, width)
    blurred = BinomialBlur(taps, stride)(x)
    assert blurred.shape[-2:] == (-(-height // stride), -(-width // stride))
    torch.testing.assert_close(blurred, slow_blur(x, row, stride, before), rtol=0, atol=1e-6)


def test_at_256_pixels_it_is_the_originals():
    with torch.device("meta"):
        network = StyleGANDiscriminator(256)
        assert network(torch.zeros(2, 3, 256, 256)).shape == (2, 1)
    assert parameters(network) == 36_500_225
    names = set(network.state_dict())
    assert len(names) == len(list(network.parameters())), "blurs are no state"
    assert {"blocks.0.weight", "blocks.2.conv_res.weight", "blocks.7.net.2.bias", "blocks.7.downsample.1.weight",
            "final_conv.0.weight", "final_linear.0.weight", "final_linear.2.bias"} <= names
    assert network.final_linear[0].weight.shape == (512, 8192)


def test_channels_follow_the_table_of_resolutions():
    table = {1024: 16, 512: 32, 256: 64, 128: 128, 64: 256, 32: 512, 16: 512, 8: 512, 4: 512}
    assert {size: channels_at(size, 64) for size in table} == table


@pytest.mark.parametrize("size", [32, 64, 128, 512, 1024])
def test_every_power_of_two_gives_one_logit_per_image(size):
    with torch.device("meta"):
        network = StyleGANDiscriminator(size)
        assert network(torch.zeros(3, 3, size, size)).shape == (3, 1)
    assert len(network.blocks) == 2 + size.bit_length() - 3  # down to a side of 4


def test_the_logits_are_those_of_the_written_out_network():
    network, images = small(8), random(2, 3, 8, 8)
    state = network.state_dict()

    def convolved(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    x = F.leaky_relu(convolved(images, "blocks.0", padding=1), 0.2)
    f = F.leaky_relu(convolved(x, "blocks.2.net.0", padding=1), 0.2)
    f = slow_blur(F.leaky_relu(convolved(f, "blocks.2.net.2", padding=1), 0.2), [1, 2, 1], 1, 1)
    x = (convolved(f, "blocks.2.downsample.1", padding=1, stride=2)
         + convolved(x, "blocks.2.conv_res", stride=2)) / 2**0.5
    x = F.leaky_relu(convolved(x, "final_conv.0", padding=1), 0.2).flatten(1)
    x = F.leaky_relu(F.linear(x, state["final_linear.0.weight"], state["final_linear.0.bias"]), 0.2)
    expected = F.linear(x, state["final_linear.2.weight"], state["final_linear.2.bias"])
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-6)


def test_weights_start_as_torchs_layers_do():
    network = small(64)
    for name, weight in network.named_parameters():
        if name.endswith("weight"):
            bound = weight[0].numel() ** -0.5  # of kaiming_uniform with a = sqrt(5)
            assert weight.abs().max() <= bound and weight.abs().max() > 0.6 * bound, name
    again = small(64)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("build", [small, lambda: PatchGAN(base_channels=8, layers=2, blur=True)])
def test_a_state_dict_comes_back_as_it_was(build):
    torch.manual_seed(1)
    network, images = build().eval(), random(2, 3, 32, 32)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01)
    other = build().eval()
    assert not torch.equal(other(images), network(images))
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(images), network(images))


@pytest.mark.parametrize("build", [small, lambda: PatchGAN(base_channels=8, layers=2, blur=True).train()])
def test_bfloat16_weights_beside_float32_buffers_take_float32_images(build):
    """What DeepSpeed makes of a network: it casts parameters and leaves buffers."""
    torch.manual_seed(0)
    network, images = build(), random(4, 3, 32, 32).requires_grad_()
    expected = network(images)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    logits = network(images)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert torch.autograd.grad(logits.float().mean(), images)[0].abs().max() > 0


def test_a_blurring_patchgan_has_the_same_weights_and_logit_map():
    with torch.device("meta"):
        plain, blurring = PatchGAN(), PatchGAN(blur=True)
        assert blurring(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    assert parameters(blurring) == parameters(plain) == 2_765_633
    strides = [layer.stride for layer in blurring.main if isinstance(layer, torch.nn.Conv2d)]
    assert strides == [(1, 1)] * 5


def test_a_blur_comes_after_norm_and_activation():
    torch.manual_seed(0)
    network, images = PatchGAN(base_channels=8, layers=2, blur=True).train(), random(2, 3, 16, 16)
    convolutions = [layer for layer in network.main if isinstance(layer, torch.nn.Conv2d)]
    norms = [layer for layer in network.main if isinstance(layer, torch.nn.BatchNorm2d)]
    x = slow_blur(F.leaky_relu(convolutions[0](images), 0.2), [1, 3, 3, 1], 2, 1)
    x = slow_blur(F.leaky_relu(norms[0](convolutions[1](x)), 0.2), [1, 3, 3, 1], 2, 1)
    x = F.leaky_relu(norms[1](convolutions[2](x)), 0.2)  # the last one keeps the side
    torch.testing.assert_close(network(images), convolutions[3](x), rtol=0, atol=1e-5)
