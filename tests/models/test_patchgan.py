"""PatchGAN against the original's names and logits, and how it starts."""

import pytest
import torch
from golden_models import arrays, manifest
from golden_weights import image, tensor

from gigatok_ds.models.discriminators.patchgan import PatchGAN


def golden_patchgan():
    network = PatchGAN()
    network.load_state_dict({
        name: value if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        else torch.from_numpy(tensor(f"discriminator.{name}", value.shape))
        for name, value in network.state_dict().items()
    })
    return network.train()


def test_names_and_shapes_are_the_originals():
    network = PatchGAN()
    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    assert shapes == manifest("losses")["patchgan"]
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_765_633


@pytest.mark.parametrize("which, name", [("real", "golden/image"), ("fake", "golden/image_b")])
def test_logits_in_training_mode_match(which, name):
    with torch.no_grad():
        logits = golden_patchgan()(torch.from_numpy(image(name, (2, 3, 256, 256))))
    expected = torch.from_numpy(arrays("losses")[f"patchgan_logits_{which}"])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_initial_distributions():
    torch.manual_seed(0)
    main = PatchGAN().main
    assert main[8].weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(main[8].weight.mean().item()) < 1e-3
    assert main[9].weight.mean().item() == pytest.approx(1.0, abs=0.005)
    assert main[9].weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert main[9].bias.abs().max() == 0
    # torch's default for biases: uniform in +-1/sqrt(fan in), here 1/sqrt(3 * 4 * 4).
    assert 0.05 < main[0].bias.abs().max() <= 48**-0.5


def test_depth_and_width_follow_the_arguments():
    network = PatchGAN(base_channels=8, layers=5)
    assert [layer.out_channels for layer in network.main if isinstance(layer, torch.nn.Conv2d)] == [
        8, 16, 32, 64, 64, 64, 1]
    assert PatchGAN(base_channels=8, layers=2)(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 6, 6)


def test_bfloat16_weights_beside_float32_buffers_take_float32_images():
    """What DeepSpeed makes of the network: it casts parameters and leaves buffers."""
    torch.manual_seed(0)
    network = PatchGAN(base_channels=8, layers=2).train()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = network(images)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    logits = network(images)
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert torch.autograd.grad(logits.float().mean(), images)[0].abs().max() > 0


def test_batch_norm_keeps_the_statistics_of_torchs():
    ours, theirs = PatchGAN(base_channels=8, layers=2).main[3], torch.nn.BatchNorm2d(16)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 16, 5, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for training in (True, True, False):
        assert torch.equal(ours.train(training)(x), theirs.train(training)(x))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
