"""Every discriminator with every pair of losses plays its game; options that do nothing somewhere are refused there."""

import dataclasses
from itertools import product

import pytest
import torch
from layout_runs import Layout, LayoutRuns, largest_differences
from torch import nn

from gigatok_ds import InputError
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.losses import AdversarialConfig, QuantizerLossConfig, ReconstructionConfig, TokenizerLossConfig
from gigatok_ds.losses.adversarial import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES
from gigatok_ds.losses.composition import TokenizerObjective, build_discriminator

SIDE = 32
VARIANTS = {
    "patchgan": dict(base_channels=8, layers=2),
    "blurring": dict(base_channels=8, layers=2, blur_downsampling=True),
    "stylegan": dict(discriminator="stylegan", base_channels=4),
    "lecam": dict(base_channels=8, layers=2, lecam_weight=0.001),
}


def stripes(count, seed):
    """Real images: vertical stripes of a random colour, in [-1, 1]."""
    rows = torch.rand((count, 3, 1, SIDE), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return rows.expand(-1, -1, SIDE, -1).contiguous()


class ToyGenerator(nn.Module):
    """Averages over neighbours, and learns what to add: reconstructions that are blurred and tinted."""

    def __init__(self):
        super().__init__()
        self.tint = nn.Parameter(torch.full((3, 1, 1), 0.2))
        self.sharpen = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images):
        return nn.functional.avg_pool2d(images, 5, stride=1, padding=2) + self.tint + self.sharpen(images)


class Game:
    """A discriminator and a toy generator under the objective's own terms."""

    def __init__(self, **settings):
        torch.manual_seed(0)
        config = AdversarialConfig(start_step=1, weight=1.0, **settings)
        self.objective = TokenizerObjective(
            TokenizerLossConfig(reconstruction=ReconstructionConfig(weight=0.0), perceptual=None,
                                quantizer=QuantizerLossConfig(), adversarial=config, auxiliary=None, semantic=None),
            perceptual=None, teacher=None)
        self.judge = build_discriminator(config, image_size=SIDE).train()
        self.generator = ToyGenerator()
        self.optimizers = {side: torch.optim.Adam(getattr(self, side).parameters(), lr=1e-3, betas=(0.5, 0.9))
                           for side in ("judge", "generator")}

    def gap(self):
        """Mean real minus mean fake logit of images that no step sees."""
        images = stripes(32, seed=10**6)
        with torch.no_grad():
            return (self.judge(images).mean() - self.judge(self.generator(images)).mean()).item()

    def judge_step(self, step):
        images = stripes(16, seed=step)
        with torch.no_grad():
            fake = self.generator(images)
        terms = self.objective.discriminator_terms(self.judge(images), self.judge(fake), None, step,
                                                   lecam=self.judge.lecam)
        self._descend("judge", sum(terms.values()))

    def generator_step(self, step):
        images = stripes(16, seed=step)
        terms = self.objective.image_terms(images, self.generator(images), None, self.judge, step)
        self._descend("generator", sum(terms.values()))

    def _descend(self, side, loss):
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        self.optimizers[side].step()


PAIRS = list(product(DISCRIMINATOR_LOSSES, GENERATOR_LOSSES))


@pytest.mark.parametrize("variant, discriminator_loss, generator_loss", [
    # Losses see logits only, whoever gives them: all pairs with one network, and each of the others with one pair,
    # always.
    pytest.param(variant, *pair, marks=[] if variant == "patchgan" or pair == PAIRS[number] else pytest.mark.slow)
    for number, variant in enumerate(VARIANTS) for pair in PAIRS
])
def test_each_pair_of_losses_trains_both_sides(variant, discriminator_loss, generator_loss):
    """The discriminator's steps open the gap between real and fake logits, against a generator that learns half as
    often; the generator's steps alone close some of it."""
    game = Game(discriminator_loss=discriminator_loss, generator_loss=generator_loss, **VARIANTS[variant])
    gaps = [game.gap()]
    for step in range(1, 31):
        game.judge_step(step)
        if step % 2 == 0:
            game.generator_step(step)
    gaps.append(game.gap())
    for step in range(31, 51):
        game.generator_step(step)
    gaps.append(game.gap())
    assert gaps[1] > gaps[0] + 0.1, gaps
    assert gaps[2] < gaps[1] - 0.05, gaps


@pytest.mark.parametrize("override, message", [
    ("discriminator=biggan", "input should be 'patchgan', 'dino' or 'stylegan'"),
    ("lecam_weight=-1", "loss.adversarial.lecam_weight is -1.0; it must be at least 0"),
    ("start_step=-1", "loss.adversarial.start_step is -1; it must be at least 0"),
    ("blur_downsampling=1", "input should be a valid boolean"),
])
def test_wrong_values_are_refused(override, message):
    with pytest.raises(InputError) as caught:
        load_recipe("VQ_SS256", [f"loss.adversarial.{override}"])
    assert message in str(caught.value)


@pytest.mark.parametrize("discriminator, setting, default", [
    ("stylegan", "blur_downsampling=true", False),
    ("dino", "blur_downsampling=true", False),
    ("stylegan", "layers=2", 3),
    ("stylegan", "kernel_size=3", 4),
    ("stylegan", "batch_norm=data_rank", "global"),
    ("dino", "layers=2", 3),
    ("dino", "base_channels=32", 64),
])
def test_what_a_discriminator_does_not_have_is_refused(discriminator, setting, default):
    overrides = [f"loss.adversarial.discriminator={discriminator}", f"loss.adversarial.{setting}"]
    with pytest.raises(InputError) as caught:
        load_recipe("VQ_SS256", overrides)
    name = setting.split("=")[0]
    assert f"loss.adversarial.{name} is " in str(caught.value) and f"leave it at {default}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size, fits", [(16, False), (32, True), (48, False), (256, True), (272, False)])
def test_stylegan_judges_powers_of_two(size, fits):
    recipe = load_recipe("demo_tokenizer", ["model.latent_tokens=16"])
    model = dataclasses.replace(recipe.model, image_size=size)
    adversarial = dataclasses.replace(recipe.loss.adversarial, layers=3, discriminator="stylegan")
    loss = dataclasses.replace(recipe.loss, adversarial=adversarial)
    if fits:
        dataclasses.replace(recipe, model=model, loss=loss)
    else:
        with pytest.raises(InputError, match=f"a power of two from 32 on, but model.image_size is {size}"):
            dataclasses.replace(recipe, model=model, loss=loss)


def test_the_recipe_decides_what_is_built():
    overrides = ["loss.adversarial.discriminator=stylegan", "loss.adversarial.base_channels=16"]
    recipe = load_recipe("VQ_SS256", overrides)
    with torch.device("meta"):
        network = build_discriminator(recipe.loss.adversarial, image_size=recipe.model.image_size)
    assert network.blocks[0].out_channels == 16 and len(network.blocks) == 8
    blurring = load_recipe("VQ_SS256", ["loss.adversarial.blur_downsampling=true"]).loss.adversarial
    with torch.device("meta"):
        network = build_discriminator(blurring, image_size=256)
    assert network.main[0].stride == (1, 1) and network.main[2].stride == 2


# Whole runs on two ranks, against one. Without the adaptive weight where the discriminator's gradient is so small that
# the ratio to it loses digits.

RUNS = {
    "stylegan": ["loss.adversarial.adaptive_weight=false", "loss.adversarial.discriminator=stylegan",
                 "loss.adversarial.base_channels=4", "loss.adversarial.layers=3",
                 "loss.adversarial.lecam_weight=0.1", "model.image_size=32"],
    "blurring": ["loss.adversarial.blur_downsampling=true"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return LayoutRuns(tmp_path_factory.mktemp("options"))


@pytest.mark.parametrize("variant, layout", [
    pytest.param("stylegan", Layout(tensor=2, stage=1), marks=pytest.mark.slow),
    pytest.param("stylegan", Layout(data=2, stage=3), marks=pytest.mark.slow),
    ("blurring", Layout(data=2, stage=2)),
], ids=str)
def test_two_ranks_train_like_a_single_process(runs, variant, layout):
    ours = runs.result("tokenizer", layout, *RUNS[variant])
    theirs = runs.result("tokenizer", Layout(), *RUNS[variant])
    losses, norms, weights = largest_differences(ours, theirs)
    assert max(losses, norms, weights) < 1e-5, (losses, norms, weights)
    judged = [line["discriminator/discriminator"] for line in theirs[0] if "discriminator/discriminator" in line]
    assert len(judged) == 7 and len(set(judged)) == 7
    assert any("discriminator/lecam" in line for line in theirs[0]) == (variant == "stylegan")
