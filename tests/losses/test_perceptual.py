"""LPIPS against the original's numbers, on VGG16 with generated weights, and what it refuses."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_models import arrays, manifest
from golden_weights import image, tensor
from torchvision.models.vgg import cfgs

from gigatok_ds.cpu import winograd
from gigatok_ds.cpu.convolution import use_winograd
from gigatok_ds.errors import InputError
from gigatok_ds.losses.perceptual import load_lpips
from gigatok_ds.models.frozen.pretrained_files import cache_folder
from gigatok_ds.parallel.dropout import dropout_at, name_dropouts


def vgg_shapes():
    """Index and shapes of VGG16's convolutions, each followed by a ReLU, with pools between stages."""
    index, channels = 0, 3
    for width in cfgs["D"]:
        if width == "M":
            index += 1
            continue
        yield index, (width, channels, 3, 3)
        index, channels = index + 2, width


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    state = {}
    for index, shape in vgg_shapes():
        name = f"features.{index}"
        state[f"{name}.weight"] = torch.from_numpy(tensor(f"vgg16.{name}.weight", shape)) * math.sqrt(2)
        state[f"{name}.bias"] = torch.from_numpy(tensor(f"vgg16.{name}.bias", shape[:1]))
    state["classifier.0.bias"] = torch.zeros(3)  # torchvision's file also holds the classifier
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def lpips(vgg_file):
    network = load_lpips(vgg_file)
    use_winograd(network)  # as where it trains on a CPU
    return network


def two_images(size=32):
    return [torch.from_numpy(image(name, (2, 3, size, size))) for name in ("golden/image", "golden/image_b")]


def test_distances_match_the_original(lpips):
    with torch.no_grad():
        ours = lpips(*two_images(256))
    np.testing.assert_allclose(ours.numpy(), arrays("losses")["lpips_vgg"], rtol=0, atol=1e-5)


def test_heads_are_the_published_ones(lpips):
    state = {name: value for name, value in lpips.state_dict().items() if not name.startswith("features.")}
    assert {name: list(value.shape) for name, value in state.items()} == manifest("losses")["lpips_lin"]
    sums = [state[f"lin{index}.model.1.weight"].sum().item() for index in range(5)]
    assert sums == pytest.approx([6.92599, 8.85833, 17.51501, 51.52132, 47.03486], abs=1e-4)


def test_is_zero_for_equal_images_and_symmetric(lpips):
    first, second = two_images()
    with torch.no_grad():
        assert lpips(first, first).abs().max() == 0
        assert lpips(first, second).min() > 0
        torch.testing.assert_close(lpips(first, second), lpips(second, first))


def test_frozen_but_differentiable_in_the_image(lpips):
    first, second = two_images()
    second.requires_grad_()
    lpips(first, second).mean().backward()
    assert second.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_distances_whose_gradient_is_wanted_match_the_original(lpips):
    first, second = two_images(256)
    ours = lpips(first, second.requires_grad_())
    np.testing.assert_allclose(ours.detach().numpy(), arrays("losses")["lpips_vgg"], rtol=0, atol=1e-5)


def test_the_gradient_is_that_of_torchs_own_convolutions(lpips, monkeypatch):
    first, second = two_images(64)
    by_winograd = winograd.has_winograd(first)
    (ours,) = torch.autograd.grad(lpips(first, second.requires_grad_()).sum(), second)
    monkeypatch.setattr(winograd, "has_winograd", lambda like: False)
    (usual,) = torch.autograd.grad(lpips(first, second).sum(), second)
    # Units next to zero come to lie on the other side of ReLU's kink, as they do between torch's own ways to convolve:
    # at 256 px by 6e-3 of the norm.
    assert (ours - usual).norm() < 1e-2 * usual.norm()
    assert torch.equal(ours, usual) != by_winograd


def test_images_are_looked_at_once_for_several_reconstructions(lpips):
    first, second = two_images()
    third = (first + second) / 2
    seen = lpips.look(first.requires_grad_())
    assert [len(stage[0]) for stage in seen] == [64, 128, 256, 512, 512]
    assert not any(stage.requires_grad for stage in seen)
    with torch.no_grad():
        for made in (second, third):
            assert torch.equal(lpips.distance(seen, made), lpips(first, made))


@pytest.mark.parametrize("precision, scale, off, pixel_cosine, patch_cosine",
                         [("bf16", 1.0, 5e-3, 0.98, 0.995),
                          pytest.param("fp16", 4096.0, 1e-3, 0.995, 0.999, marks=pytest.mark.slow)])
def test_lower_precision_changes_distances_and_gradients_little(vgg_file, lpips, precision, scale, off, pixel_cosine,
                                                                patch_cosine):
    """VGG16 in bfloat16 (8 bits) or half precision (11 bits, the loss scaled as in training) against float32.

    Measured: distances off by 1.0e-3 and 5e-5, relative. Rounding flips ReLUs and maxima, which is noise in the
    gradient from pixel to pixel (cosine 0.984 and 0.9975) that averages out over 8 x 8 of them (0.998 and 0.9998).
    """
    first, second = two_images(64)
    results = []
    for network in (lpips, load_lpips(vgg_file, precision=precision)):
        leaf = second.clone().requires_grad_()
        distances = network(first, leaf)
        (gradient,) = torch.autograd.grad(scale * distances.mean(), leaf)
        results.append((distances, gradient))
    (exact, expected), (ours, gradient) = results
    assert ours.dtype == gradient.dtype == torch.float32
    relative = ((ours - exact).abs() / exact).max().item()
    assert 0 < relative < off
    assert torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > pixel_cosine
    patches = [F.avg_pool2d(each, 8).flatten() for each in (gradient, expected)]
    assert torch.cosine_similarity(*patches, dim=0) > patch_cosine
    assert gradient.norm().item() == pytest.approx(expected.norm().item(), rel=off)


def test_positions_without_any_feature_do_not_make_the_gradient_nan(vgg_file):
    network = load_lpips(vgg_file)
    network.features[0].bias.fill_(-1e6)  # every ReLU of the first stage is off
    network.features[2].bias.fill_(-1e6)
    first, second = two_images()
    second.requires_grad_()
    network(first, second).mean().backward()
    assert torch.isfinite(second.grad).all()


def test_dropout_is_active_only_in_training_and_only_when_asked(vgg_file, lpips):
    first, second = (images[:1].expand(100, -1, -1, -1) for images in two_images(16))
    with torch.no_grad():
        exact = lpips.eval()(first, second)
        assert torch.equal(lpips.train()(first, second), exact)
        noisy = load_lpips(vgg_file, dropout=True).train()
        torch.manual_seed(0)
        draws = noisy(first, second)
        assert draws.std() > 0.005 * exact[0]
        assert draws.mean().item() == pytest.approx(exact[0].item(), rel=0.05)  # unbiased
        assert torch.equal(noisy.eval()(first, second), exact)


def test_missing_vgg_names_the_file_its_place_and_the_key(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert cache_folder().is_relative_to(tmp_path)
    for weights in (None, tmp_path / "elsewhere.pth"):
        with pytest.raises(InputError) as error:
            load_lpips(weights)
        said = str(error.value)
        assert "VGG16_Weights.IMAGENET1K_V1" in said and "vgg16-397923af.pth" in said
        assert "loss.perceptual.weights" in said and str(weights or cache_folder() / "vgg16-397923af.pth") in said
        assert "https://download.pytorch.org/models/vgg16-397923af.pth" in said


def test_another_networks_file_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(InputError, match=r"loss.perceptual.weights: .* holds another network"):
        load_lpips(path)


def test_its_dropout_is_addressed_by_image(vgg_file):
    """Half of the values count twice; which ones depends on an image's number, not on what else is in the batch."""
    network = load_lpips(vgg_file, dropout=True)
    name_dropouts(network, "perceptual")
    images, others = two_images()
    numbers = torch.tensor([7, 2**40 + 3])
    with torch.no_grad():
        with dropout_at(1, numbers):
            together = network.train()(images, others)
        alone = []
        for index in range(2):
            with dropout_at(1, numbers, numbers[index : index + 1]):
                alone.append(network(images[index : index + 1], others[index : index + 1]))
        exact = network.eval()(images, others)
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-5, atol=0)
    assert (together != exact).all() and ((together - exact).abs() < 0.2 * exact).all()
