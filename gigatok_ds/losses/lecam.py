"""LeCam regularization of a discriminator (Tseng et al. 2021, arXiv:2104.03310, equation 7).

Logits of real images are drawn to the running mean of fake ones and the other way round, so that a discriminator of few
images does not become too sure of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.parallel.reduce import RankMean

DECAY = 0.99
SETTLING_STEPS = 1000  # after the discriminator's start; until then the means are those of the step itself


class LeCam(nn.Module):
    """Running means of a discriminator's logits: a buffer, so that whoever saves the discriminator saves them.

    A step counts once however many micro batches it has, and `average` makes the means those of all ranks.
    """

    mean_logits: Tensor

    def __init__(self, start_step: int, average: RankMean | None = None):
        """start_step: the discriminator's first step. The means are set there, and have no initial value to forget."""
        super().__init__()
        self.start_step, self.average = start_step, average
        self.register_buffer("mean_logits", torch.zeros(2))  # of real images, of fake ones
        self._step: int | None = None
        self._before: Tensor | None = None  # the running means when this step began
        self._of_step: list[Tensor] = []  # the means of its micro batches

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor, step: int) -> None:
        """Take in the logits of this rank's micro batch of `step`; logits have any shape. Collective."""
        means = torch.stack([real.float().mean(), fake.float().mean()])
        if self.average:
            means = self.average(means)
        if step != self._step or self._before is None:
            self._step, self._before, self._of_step = step, self.mean_logits.clone(), []
        self._of_step.append(means)
        decay = DECAY if step >= self.start_step + SETTLING_STEPS else 0.0
        self.mean_logits.copy_(self._before * decay + torch.stack(self._of_step).mean(0) * (1 - decay))

    def penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        """Mean squared excess of real logits over the mean fake one, and of the mean real one over fake logits."""
        mean_real, mean_fake = self.mean_logits
        return F.relu(real.float() - mean_fake).square().mean() + F.relu(mean_real - fake.float()).square().mean()
