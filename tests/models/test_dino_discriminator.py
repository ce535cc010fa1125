"""The DINO discriminator: golden logits, names, spectral norm, virtual batches, how images are fitted."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_models import arrays, manifest
from golden_weights import image, stream, tensor

from gigatok_ds.compat import timm_library
from gigatok_ds.errors import InputError
from gigatok_ds.losses.diffaug import diff_augment
from gigatok_ds.models.discriminators.dino import (
    BatchNormLocal,
    DinoDiscriminator,
    SpectralConv1d,
    dino_backbone,
    fit_to_backbone,
)
from gigatok_ds.streams import SampleDraws


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(seed, count):
    """Random numbers for the `count` images of a batch that one rank holds alone."""
    return SampleDraws(seeded(seed), count, torch.arange(count))


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory):
    shapes = manifest("losses")["dino_vit_small"]
    path = tmp_path_factory.mktemp("dino") / "backbone.pth"
    state = {name: torch.from_numpy(tensor(f"dino.{name}", shape)) for name, shape in shapes.items()}
    torch.save(state, path)
    return path


def golden_head_value(name, shape):
    if name.endswith(("weight_u", "weight_v")):
        vector = stream(f"discriminator.{name}").standard_normal(tuple(shape), dtype=np.float32)
        return torch.from_numpy(vector / np.linalg.norm(vector)).float()
    return torch.from_numpy(tensor(f"discriminator.{name}", shape))


@pytest.fixture(scope="module")
def golden_discriminator(backbone_file):
    network = DinoDiscriminator(dino_backbone(backbone_file))
    shapes = manifest("losses")["dinodisc"]
    network.load_state_dict({name: golden_head_value(name, shape) for name, shape in shapes.items()})
    return network.eval()


def tiny_discriminator(**options):
    torch.manual_seed(0)
    backbone = timm_library().models.VisionTransformer(patch_size=16, embed_dim=12, depth=12, num_heads=2,
                                                       num_classes=0)
    return DinoDiscriminator(backbone, **options)


def test_names_and_shapes_are_the_originals(golden_discriminator):
    shapes = {name: list(value.shape) for name, value in golden_discriminator.state_dict().items()}
    expected = manifest("losses")["dinodisc"]
    assert shapes == expected and list(shapes) == list(expected)
    assert sum(parameter.numel() for parameter in golden_discriminator.parameters()) == 7_386_245


def test_activations_and_logits_match(golden_discriminator):
    golden = arrays("losses")
    images = torch.from_numpy(image("golden/image8", (8, 3, 224, 224)))
    with torch.no_grad():
        activations = torch.stack(list(golden_discriminator.activations(images)))
        logits = golden_discriminator(images)
    assert activations.shape == (5, 8, 384, 196)
    moments = torch.stack([activations.double().mean((1, 2, 3)), activations.double().std((1, 2, 3))], dim=1)
    np.testing.assert_allclose(moments.numpy(), golden["dino_activations_mean_std"], rtol=0, atol=1e-5)
    # Random singular vectors make logits of standard deviation 41; against the same network in float64, the
    # golden ones are off by up to 2.7e-4 (7e-6 of that) and ours by 3.3e-4.
    expected = golden["dinodisc_logits_eval_224"]
    np.testing.assert_allclose(logits.numpy() / expected.std(), expected / expected.std(), rtol=0, atol=1e-5)


def test_backbone_is_frozen_apart_from_the_state_and_has_no_key_bias(backbone_file):
    backbone = dino_backbone(backbone_file)
    published = torch.load(backbone_file, weights_only=True)
    for name, value in backbone.state_dict().items():
        expected = published[name].clone()
        if name.endswith("attn.qkv.bias"):
            assert expected[384:768].abs().max() > 0
            expected[384:768] = 0
        assert torch.equal(value, expected), name
    network = DinoDiscriminator(backbone)
    assert not {id(p) for p in backbone.parameters()} & {id(p) for p in network.parameters()}
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert all(name.startswith("heads.") for name in network.state_dict())
    network.train().bfloat16()
    assert backbone.cls_token.dtype == torch.float32 and not backbone.training


@pytest.mark.parametrize("case, said", [
    ("unset", "there is no file .*/checkpoints/dino_deitsmall16_pretrain.pth; .* from https://dl.fbaipublicfiles.com"),
    ("missing", "there is no file .*weights.pth"),
    ("text", "cannot be read"),
    ("list", "not a plain state_dict"),
    ("other", "holds another network: blocks.0.attn.proj.bias"),
])
def test_backbone_files_that_are_refused(case, said, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = None if case == "unset" else tmp_path / "weights.pth"
    if case == "text":
        path.write_text("not weights")
    elif case == "list":
        torch.save([torch.zeros(1)], path)
    elif case == "other":
        torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=said) as error:
        dino_backbone(path)
    assert "loss.adversarial.backbone_weights" in str(error.value) and "\n" not in str(error.value)


def test_spectral_norm_is_that_of_torch():
    torch.manual_seed(0)
    ours = SpectralConv1d(6, 5, 9)
    theirs = torch.nn.utils.spectral_norm(torch.nn.Conv1d(6, 5, 9, padding=4, padding_mode="circular"))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 14, generator=seeded())
    for training in (True, True, False):
        layers = [layer.train(training) for layer in (ours, theirs)]
        outputs = [layer(x) for layer in layers]
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)
        gradients = [torch.autograd.grad(output.square().sum(), layer.weight_orig)[0]
                     for output, layer in zip(outputs, layers, strict=True)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)


def test_spectral_norm_converges_in_training_and_rests_in_evaluation():
    torch.manual_seed(0)
    layer = SpectralConv1d(6, 5, 3)
    for _ in range(200):
        normalized = layer.normalized_weight().detach()
    assert torch.linalg.matrix_norm(normalized.flatten(1), 2).item() == pytest.approx(1.0, abs=1e-4)
    before = layer.weight_u.clone()
    layer.eval().normalized_weight()
    assert torch.equal(layer.weight_u, before)


def test_virtual_batches_are_normalised_apart():
    torch.manual_seed(0)
    norm = BatchNormLocal(3)
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    x = torch.randn(16, 3, 10, generator=seeded()) * torch.arange(1, 17).view(16, 1, 1)
    ours = norm(x)
    for part in (slice(0, 8), slice(8, 16)):
        expected = F.batch_norm(x[part], None, None, norm.weight, norm.bias, training=True, eps=1e-6)
        torch.testing.assert_close(ours[part], expected, rtol=0, atol=1e-5)
    assert torch.equal(ours, norm.eval()(x))
    assert norm(x[:12]).shape == x[:12].shape  # two of six
    with pytest.raises(InputError, match=r"9 images into 2 equal virtual batches.*training.micro_batch_size"):
        norm(x[:9])


def test_larger_images_are_cropped_or_averaged_as_the_stream_says():
    images = torch.rand(2, 3, 256, 240, generator=seeded())
    averaged = F.interpolate(images, size=(224, 224), mode="area")
    patches = images.unfold(2, 224, 1).unfold(3, 224, 1)  # every crop there is: (B, 3, 33, 17, 224, 224)
    crops, places = 0, set()
    for seed in range(60):
        fitted = fit_to_backbone(images, draws(seed, 2))
        assert torch.equal(fitted, fit_to_backbone(images, draws(seed, 2)))
        if torch.equal(fitted, averaged):
            continue
        # Only crops have the exact corner pixel; then the whole must be that crop.
        corners = (patches[0, 0, :, :, 0, 0] == fitted[0, 0, 0, 0]).nonzero().tolist()
        matching = [place for place in corners if torch.equal(patches[:, :, place[0], place[1]], fitted)]
        assert len(matching) == 1
        places.add(tuple(matching[0]))
        crops += 1
    assert 18 <= crops <= 42  # half of 60, within three standard deviations
    assert len(places) > 0.8 * crops
    assert max(row for row, _ in places) > 22 and max(column for _, column in places) > 11


def test_smaller_images_are_enlarged_and_fitting_ones_kept():
    images = torch.rand(1, 3, 32, 32, generator=seeded())
    assert fit_to_backbone(images).shape == (1, 3, 224, 224)
    exact = torch.rand(1, 3, 224, 224, generator=seeded())
    torch.testing.assert_close(fit_to_backbone(exact), exact, rtol=0, atol=1e-6)


def test_the_gradient_reaches_the_image_and_the_heads_only():
    network = tiny_discriminator(augment=diff_augment).train()
    images = (torch.rand(4, 3, 64, 64, generator=seeded()) * 2 - 1).requires_grad_()
    logits = network(images, draws(3, 4))
    assert logits.shape == (4, 5 * 196)
    logits.square().mean().backward()
    assert images.grad.abs().max() > 0
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_augmentation_and_crop_come_from_the_draws():
    network = tiny_discriminator(augment=diff_augment).eval()
    images = torch.rand(2, 3, 64, 64, generator=seeded()) * 2 - 1
    with torch.no_grad():
        first, again, other = (network(images, draws(seed, 2)) for seed in (1, 1, 2))
        plain = tiny_discriminator().eval()(images)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other) and not torch.allclose(first, plain)


def test_heads_start_like_torchs_convolutions():
    bound = 1 / math.sqrt(12 * 9)
    weight = tiny_discriminator().heads[0][1].fn[0].weight_orig
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_heads_in_bfloat16_beside_float32_buffers_take_float32_images():
    """What DeepSpeed makes of the network: it casts parameters and leaves buffers."""
    network, reference = tiny_discriminator().train(), tiny_discriminator().train()
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    images = (torch.rand(2, 3, 224, 224, generator=seeded()) * 2 - 1).requires_grad_()
    logits, expected = network(images).float(), reference(images)
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.autograd.grad(logits.mean(), images)[0].abs().max() > 0
    assert network.heads[0][2].weight_u.dtype == torch.float32
