"""Adversarial losses, and the augmentation in front of the DINO discriminator."""

import pytest
import torch
import torch.nn.functional as F
from golden_models import arrays

from gigatok_ds.losses.adversarial import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES
from gigatok_ds.losses.diffaug import cut_out, diff_augment, recolour, translate
from gigatok_ds.streams import SampleDraws


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(seed, count):
    """Random numbers for the `count` images of a batch that one rank holds alone."""
    return SampleDraws(seeded(seed), count, torch.arange(count))


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(value) for name, value in arrays("losses").items()}


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_discriminator_losses_match_the_original(golden, kind):
    ours = DISCRIMINATOR_LOSSES[kind](golden["patchgan_logits_real"], golden["patchgan_logits_fake"])
    assert ours.item() == pytest.approx(golden[f"d_{kind}"].item(), abs=1e-6)


def test_hinge_generator_loss_matches_the_original(golden):
    ours = GENERATOR_LOSSES["hinge"](golden["patchgan_logits_fake"])
    assert ours.item() == pytest.approx(golden["g_hinge"].item(), abs=1e-6)


def test_non_saturating_generator_loss_is_the_cross_entropy_of_the_label_real(golden):
    logits = golden["patchgan_logits_fake"]
    expected = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    torch.testing.assert_close(GENERATOR_LOSSES["non_saturating"](logits), expected, rtol=0, atol=1e-6)


def test_vanilla_discriminator_loss_is_the_mean_cross_entropy(golden):
    real, fake = golden["patchgan_logits_real"], golden["patchgan_logits_fake"]
    both = [F.binary_cross_entropy_with_logits(real, torch.ones_like(real)),
            F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))]
    torch.testing.assert_close(DISCRIMINATOR_LOSSES["vanilla"](real, fake), sum(both) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", GENERATOR_LOSSES.values())
def test_the_generator_wants_higher_logits(loss):
    logits = torch.linspace(-3, 3, 7, requires_grad=True)
    loss(logits).backward()
    assert (logits.grad < 0).all()


@pytest.mark.parametrize("loss", DISCRIMINATOR_LOSSES.values())
def test_the_discriminator_wants_real_above_fake(loss):
    real, fake = (torch.full((4,), 0.3, requires_grad=True) for _ in range(2))
    loss(real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()


def test_extreme_logits_stay_finite_in_half_precision():
    logits = torch.tensor([-6e4, 0.0, 6e4], dtype=torch.float16)
    for loss in GENERATOR_LOSSES.values():
        assert loss(logits).isfinite() and loss(logits).dtype == torch.float32
    for loss in DISCRIMINATOR_LOSSES.values():
        assert loss(logits, logits).isfinite()


def slow_diff_augment(images, u):
    """One image at a time, as the specification words it."""
    result = []
    _, _channels, height, width = images.shape
    for index, image in enumerate(images):
        reach = [round(0.125 * side) for side in (height, width)]
        shift = [int(u[i, index] * (2 * reach[i] + 1)) - reach[i] for i in range(2)]
        moved = torch.zeros_like(image)
        for row in range(height):
            for column in range(width):
                if 0 <= row + shift[0] < height and 0 <= column + shift[1] < width:
                    moved[:, row, column] = image[:, row + shift[0], column + shift[1]]
        x = moved + u[2, index] - 0.5
        gray = x.mean(0)
        x = (x - gray) * (2 * u[3, index]) + gray
        x = (x - x.mean()) * (u[4, index] + 0.5) + x.mean()
        extent = [round(0.2 * side) for side in (height, width)]
        start = [int(u[5 + i, index] * (side + 1 - extent[i] % 2)) - extent[i] // 2
                 for i, side in enumerate((height, width))]
        rows = slice(max(start[0], 0), max(start[0] + extent[0], 0))
        columns = slice(max(start[1], 0), max(start[1] + extent[1], 0))
        x[:, rows, columns] = 0
        result.append(x)
    return torch.stack(result)


@pytest.mark.parametrize("height, width", [(24, 26), (16, 31)])
def test_augmentation_is_the_specified_one(height, width):
    images = torch.rand(12, 3, height, width, generator=seeded()) * 2 - 1
    expected = slow_diff_augment(images, torch.rand((7, 12), generator=seeded(5)))
    torch.testing.assert_close(diff_augment(images, draws(5, 12)), expected, rtol=0, atol=1e-6)


def test_augmentation_depends_on_the_draws_only():
    images = torch.rand(3, 3, 16, 16, generator=seeded())
    torch.manual_seed(1)
    first = diff_augment(images, draws(7, 3))
    torch.manual_seed(2)
    assert torch.equal(first, diff_augment(images, draws(7, 3)))
    assert not torch.equal(first, diff_augment(images, draws(8, 3)))


def test_an_image_is_augmented_alike_on_every_layout():
    images = torch.rand(6, 3, 16, 16, generator=seeded())
    full = diff_augment(images, draws(7, 6))
    rows = torch.tensor([4, 1])
    assert torch.equal(diff_augment(images[rows], SampleDraws(seeded(7), 6, rows)), full[rows])


def test_extremes_of_each_operation_at_256_pixels():
    images = torch.rand(2, 3, 256, 256, generator=seeded()) + 1
    ends = torch.tensor([0.0, 1 - 2**-24])
    moved = translate(images, ends, ends)
    assert torch.equal(moved[0, :, 32:, 32:], images[0, :, :-32, :-32]) and moved[0, :, :32].abs().max() == 0
    assert torch.equal(moved[1, :, :-32, :-32], images[1, :, 32:, 32:]) and moved[1, :, -32:].abs().max() == 0
    holes = cut_out(images, ends, ends) == 0
    assert holes[0, 0].nonzero().max() == 25 and holes[0, 0, :26, :26].all()  # 51 wide, centred on the corner
    assert holes[1, 0].nonzero().min() == 230 and holes[1, 0, 230:, 230:].all()
    middle = cut_out(images, torch.full((2,), 0.5), torch.full((2,), 0.5)) == 0
    assert middle[0, 0].sum() == 51 * 51
    same = torch.full((2,), 0.5)
    torch.testing.assert_close(recolour(images, same, same, same), images, rtol=0, atol=1e-5)


def test_augmentation_passes_the_gradient():
    images = torch.rand(2, 3, 16, 16, generator=seeded(), dtype=torch.float32).requires_grad_()
    augmented = diff_augment(images, draws(3, 2))
    augmented.square().sum().backward()
    assert images.grad.isfinite().all() and (images.grad != 0).float().mean() > 0.5
