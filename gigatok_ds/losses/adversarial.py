"""Both sides of the adversarial game, on logits of any shape that are high for real images.

The published non-saturating losses pass logits and labels in swapped places; these are the ones that were
meant (Goodfellow et al. 2014), in the numerically stable form with softplus.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def vanilla_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Mean of the two binary cross-entropies: real images labelled 1, fake ones 0."""
    return 0.5 * (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    return -fake.float().mean()


def non_saturating_generator_loss(fake: Tensor) -> Tensor:
    """Binary cross-entropy of fake images labelled 1."""
    return F.softplus(-fake.float()).mean()


# By AdversarialConfig.discriminator_loss and .generator_loss.
DISCRIMINATOR_LOSSES = {"hinge": hinge_discriminator_loss, "vanilla": vanilla_discriminator_loss}
GENERATOR_LOSSES = {"hinge": hinge_generator_loss, "non_saturating": non_saturating_generator_loss}
