"""When each term of the objective is active, and what it weighs."""

import pytest
import torch
import torch.nn.functional as F

from gigatok_ds.config.losses import (
    AdversarialConfig,
    AuxiliaryConfig,
    PerceptualConfig,
    QuantizerLossConfig,
    ReconstructionConfig,
    SemanticConfig,
    TokenizerLossConfig,
)
from gigatok_ds.errors import InputError
from gigatok_ds.losses.adversarial import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES
from gigatok_ds.losses.composition import TokenizerObjective, build_discriminator, build_objective
from gigatok_ds.losses.perceptual import PerceptualDistance
from gigatok_ds.models.discriminators.patchgan import PatchGAN
from gigatok_ds.models.quantizer import QuantizerLosses
from gigatok_ds.models.tokenizer import TokenizerOutput

BEFORE, DURING, AFTER = 5, 15, 25


def full_config(**changes):
    settings = dict(
        reconstruction=ReconstructionConfig(kind="l2", weight=2.0),
        perceptual=PerceptualConfig(weight=3.0),
        quantizer=QuantizerLossConfig(codebook=1.5, commitment=0.25, entropy=0.1, entropy_end_step=20),
        adversarial=AdversarialConfig(start_step=10, weight=0.5),
        auxiliary=AuxiliaryConfig(end_step=20, feature_weight=0.7),
        semantic=SemanticConfig(weight=0.4),
    )
    return TokenizerLossConfig(**settings | changes)


class Distance(PerceptualDistance):
    """In LPIPS's place: one number per pair, and how often it has looked at the images."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.looks = 0

    def look(self, images):
        self.looks += 1
        return [images]

    def distance(self, seen, reconstruction):
        return self.scale * (seen[0] - reconstruction).abs().mean(dim=(1, 2, 3))


class Tokens(torch.nn.Module):
    """In the teacher's place: 16 tokens of width 3."""

    def forward(self, images):
        return F.avg_pool2d(images, 2).flatten(2).transpose(1, 2)


def objective(**changes):
    config = full_config(**changes)
    return TokenizerObjective(config, perceptual=Distance() if config.perceptual else None,
                              teacher=Tokens() if config.semantic else None)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IMAGES, RECONSTRUCTION, DIRECT = (random(2, 3, 8, 8, seed=seed) for seed in range(3))
TARGET = Tokens()(IMAGES)


def discriminate(images):
    return images.mean(dim=1)


def values(terms):
    return {name: value.item() for name, value in terms.items()}


@pytest.mark.parametrize("step, auxiliary, discriminator", [
    (1, True, False), (9, True, False), (10, True, True), (19, True, True), (20, False, True),
    (10**6, False, True)])
def test_terms_switch_exactly_at_their_step(step, auxiliary, discriminator):
    ours = objective()
    assert ours.config.wants_feature_loss(step) == ours.config.wants_direct_reconstruction(step) == auxiliary
    assert ours.config.discriminator_active(step) == discriminator
    image_terms = ours.image_terms(IMAGES, RECONSTRUCTION, DIRECT, discriminate, step)
    assert ours.perceptual.looks == 1  # for both reconstructions
    expected = {"reconstruction", "perceptual"} | ({"adversarial"} if discriminator else set())
    assert image_terms.keys() == expected | ({f"direct_{name}" for name in expected} if auxiliary else set())
    latent_terms = ours.latent_terms(output(), TARGET, step)
    assert latent_terms.keys() == {"codebook", "commitment", "semantic"} | (
        {"feature", "entropy"} if auxiliary else set())


def test_direct_reconstruction_can_be_left_out_while_the_feature_loss_stays():
    ours = objective(auxiliary=AuxiliaryConfig(end_step=20, direct_reconstruction=False))
    assert ours.config.wants_feature_loss(19) and not ours.config.wants_direct_reconstruction(19)
    terms = ours.image_terms(IMAGES, RECONSTRUCTION, None, discriminate, 19)
    assert not any(name.startswith("direct") for name in terms)


def test_everything_optional_can_be_left_out():
    ours = objective(perceptual=None, adversarial=None, auxiliary=None, semantic=None,
                     quantizer=QuantizerLossConfig(entropy=0.0))
    assert not ours.config.wants_feature_loss(1) and not ours.config.wants_direct_reconstruction(1)
    assert not ours.config.discriminator_active(10**6)
    assert ours.image_terms(IMAGES, RECONSTRUCTION, None, None, 1).keys() == {"reconstruction"}
    assert ours.latent_terms(output(), None, 1).keys() == {"codebook", "commitment"}


@pytest.mark.parametrize("kind, loss", [("l1", F.l1_loss), ("l2", F.mse_loss)])
@pytest.mark.parametrize("generator_loss", GENERATOR_LOSSES)
def test_image_terms_are_weighted_and_see_the_right_image(kind, loss, generator_loss):
    ours = objective(reconstruction=ReconstructionConfig(kind=kind, weight=2.0),
                     adversarial=AdversarialConfig(start_step=10, weight=0.5, generator_loss=generator_loss))
    terms = values(ours.image_terms(IMAGES, RECONSTRUCTION, DIRECT, discriminate, DURING))
    expected = {}
    for prefix, image in (("", RECONSTRUCTION), ("direct_", DIRECT)):
        expected[f"{prefix}reconstruction"] = 2.0 * loss(image, IMAGES).item()
        expected[f"{prefix}perceptual"] = 3.0 * 2.0 * (IMAGES - image).abs().mean().item()
        expected[f"{prefix}adversarial"] = 0.5 * GENERATOR_LOSSES[generator_loss](discriminate(image)).item()
    assert terms == pytest.approx(expected, rel=1e-5)


def output():
    return TokenizerOutput(
        reconstruction=RECONSTRUCTION,
        codes=torch.zeros(2, 4, dtype=torch.int64),
        quantizer_losses=QuantizerLosses(*torch.tensor([2.0, 3.0, -4.0])),
        cnn_feature=random(2, 5, 4, 4, seed=3).requires_grad_(),
        decoded_feature=random(2, 5, 4, 4, seed=4).requires_grad_(),
        semantic_feature=random(2, 16, 3, seed=5).requires_grad_(),
        direct_reconstruction=DIRECT,
    )


def test_latent_terms_are_weighted():
    out = output()
    terms = values(objective().latent_terms(out, TARGET, BEFORE))
    cosine = F.cosine_similarity(out.semantic_feature, Tokens()(IMAGES), dim=-1).mean().item()
    assert terms == pytest.approx({
        "codebook": 1.5 * 2, "commitment": 0.25 * 3, "entropy": 0.1 * -4,
        "feature": 0.7 * F.mse_loss(out.decoded_feature, out.cnn_feature).item(), "semantic": -0.4 * cosine,
    }, rel=1e-5)


def test_the_entropy_term_never_ends_without_an_end_step():
    ours = objective(quantizer=QuantizerLossConfig(entropy=0.1))
    assert values(ours.latent_terms(output(), TARGET, 10**9))["entropy"] == pytest.approx(-0.4)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_the_feature_loss_teaches_the_decoder_and_not_the_cnn(kind):
    out = output()
    ours = objective(auxiliary=AuxiliaryConfig(end_step=20, feature=kind))
    loss = ours.latent_terms(out, TARGET, BEFORE)["feature"]
    expected = (F.mse_loss(out.decoded_feature, out.cnn_feature) if kind == "mse" else
                1 - F.cosine_similarity(out.decoded_feature, out.cnn_feature, dim=1).mean())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert out.decoded_feature.grad.abs().max() > 0 and out.cnn_feature.grad is None


@pytest.mark.parametrize("kind, loss", DISCRIMINATOR_LOSSES.items())
def test_discriminator_terms_carry_the_adversarial_weight(kind, loss):
    real, fake, direct = (random(2, 1, 3, 3, seed=seed) for seed in (6, 7, 8))
    ours = objective(adversarial=AdversarialConfig(start_step=10, weight=0.5, discriminator_loss=kind))
    terms = values(ours.discriminator_terms(real, fake, direct, DURING))
    assert terms == pytest.approx({"discriminator": 0.5 * loss(real, fake).item(),
                                   "direct_discriminator": 0.5 * loss(real, direct).item()}, rel=1e-6)
    assert ours.discriminator_terms(real, fake, direct, AFTER).keys() == {"discriminator"}
    assert ours.discriminator_terms(real, fake, None, DURING).keys() == {"discriminator"}


def test_the_objective_has_nothing_to_train_and_passes_the_gradient():
    ours = objective()
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    leaves = [RECONSTRUCTION.clone().requires_grad_(), DIRECT.clone().requires_grad_()]
    terms = ours.image_terms(IMAGES, *leaves, discriminate, DURING)
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(sum(terms.values()), leaves))


def test_build_objective_names_the_files_that_are_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"loss.perceptual.weights"):
        build_objective(full_config(), device="cpu")
    with pytest.raises(InputError, match=r"loss.semantic.weights"):
        build_objective(full_config(perceptual=None), device="cpu")
    ours = build_objective(full_config(perceptual=None, semantic=None), device="cpu")
    assert ours.perceptual is None and ours.teacher is None


def test_build_discriminator_follows_its_configuration():
    config = AdversarialConfig(start_step=1, base_channels=8, layers=2, kernel_size=3)
    network = build_discriminator(config, image_size=8)
    assert isinstance(network, PatchGAN)
    assert network.main[0].weight.shape == (8, 3, 3, 3) and len(network.main) == 9
    assert network(IMAGES, torch.Generator()).shape[:2] == (2, 1)
    with pytest.raises(InputError, match=r"loss.adversarial.backbone_weights"):
        build_discriminator(AdversarialConfig(start_step=1, discriminator="dino"), image_size=256)
