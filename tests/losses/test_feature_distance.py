"""Perceptual distances in DINOv2's tokens and ResNet-50's logits, against their formulas on plain networks."""

import pytest
import torch
import torch.nn.functional as F

from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.losses import PerceptualConfig
from gigatok_ds.errors import InputError
from gigatok_ds.losses.composition import build_perceptual
from gigatok_ds.losses.feature_distance import load_feature_distance
from gigatok_ds.losses.semantic import Teacher

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def two_images(count, size=48):
    return torch.rand(2, count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    """ResNet-50 with statistics of its own, as a trained one has them."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    network = resnet50()
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    path = tmp_path_factory.mktemp("resnet") / "resnet50-11ad3fa6.pth"
    torch.save(network.state_dict(), path)
    return path, network.eval()


def test_resnet50_compares_logits_and_stays_in_evaluation_mode(resnet_file):
    path, network = resnet_file
    ours = load_feature_distance("resnet50", path.parent).train()
    images, made = two_images(2)

    def logits(x):
        x = F.interpolate(x, (224, 224), mode="bilinear", antialias=True)
        return network(((x + 1) / 2 - MEAN) / STD)

    with torch.no_grad():
        expected = (logits(images) - logits(made)).square().mean(1)
        torch.testing.assert_close(ours(images, made), expected, rtol=1e-4, atol=0)
    for name, value in network.state_dict().items():
        assert torch.equal(ours.network.network.state_dict()[name], value), name


def test_dinov2_compares_the_normalised_patch_tokens():
    ours = build_perceptual(PerceptualConfig(model="dinov2-s", weights="random")).train()
    teacher = Teacher("dinov2-vit-s", "random")
    teacher.vit.network.load_state_dict(ours.network.network.state_dict())
    images, made = two_images(2)
    with torch.no_grad():
        tokens = teacher(images)
        assert tokens.shape == (2, 256, 384)
        expected = (tokens - teacher(made)).square().mean((1, 2))
        torch.testing.assert_close(ours(images, made), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("model", ["dinov2-s", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_the_gradient_reaches_the_reconstruction_in_either_precision(model):
    images, made = two_images(1)
    gradients = []
    for precision in ("fp32", "bf16"):
        ours = build_perceptual(PerceptualConfig(model=model, weights="random"), precision=precision)
        assert not any(parameter.requires_grad for parameter in ours.parameters())
        leaf = made.clone().requires_grad_()
        seen = ours.look(images.clone().requires_grad_())
        assert not seen[0].requires_grad and seen[0].dtype == torch.float32
        distances = ours.distance(seen, leaf)
        assert distances.shape == (1,) and distances.dtype == torch.float32
        gradients.append(torch.autograd.grad(distances.mean(), leaf)[0].flatten())
    assert not torch.equal(*gradients)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9


def test_what_does_nothing_or_is_missing_is_refused(monkeypatch, tmp_path):
    for model in ("dinov2-s", "resnet50"):
        with pytest.raises(InputError, match=f"loss.perceptual.dropout is true, a setting of vgg only, not of {model}"):
            load_recipe("VQ_SS256", [f"loss.perceptual={{model: {model}, dropout: true}}"])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for model, file in (("dinov2-s", "dinov2_vits14_pretrain.pth"), ("resnet50", "resnet50-11ad3fa6.pth")):
        with pytest.raises(InputError, match=f"loss.perceptual.weights: there is no file .*{file}"):
            load_feature_distance(model)
    with pytest.raises(InputError, match=r"loss.adversarial.backbone_weights is some.pth, a setting of dino only"):
        load_recipe("VQ_SS256", ["loss.adversarial.backbone_weights=some.pth"])
