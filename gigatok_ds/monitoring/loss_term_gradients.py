"""How hard each weighted term of the generator's objective pulls: the length of its gradient at what it compares.

Normed is the gradient of the term, a mean over the global batch with its weight, at one tensor that holds the whole
global batch, so that the norm depends neither on ranks nor on micro batches:

- reconstruction, perceptual, adversarial and direct_*: at the CNN decoder's output, (images, 3, S, S). An adversarial
  term counts with the adaptive weight, where there is one.
- feature: at the transformer decoder's output (images, z, G, G); semantic: at the semantic head's (images, G * G,
  width).
- commitment and entropy: at the latents as they are compared, normalised if codes are, (images * T, D); codebook: at
  the code that each latent chose, (images * T, D).

With R ranks (data ranks for terms of the latents, which tensor ranks compute alike) and A micro batches a step, a
rank's gradient g of its own mean is R A times its part of that gradient. Its squared norm is then the mean of
|g|^2 / (R A) over ranks and micro batches: plain means, as everything logged is. A logged norm is the root of the
mean square over the steps since the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from gigatok_ds.config.losses import QuantizerLossConfig
from gigatok_ds.models.quantizer import VectorQuantizer
from gigatok_ds.models.tokenizer import TokenizerOutput
from gigatok_ds.parallel.topology import Topology

PREFIX = "term_grad/"


class TermGradients:
    """Collects the terms' squared gradient norms of one micro batch at a time.

    Terms of images are told as they are differentiated. The others are met in the engine's backward pass by hooks on
    views; `scale_probe` joins the loss as a zero whose own gradient says by how much the engine scaled it.
    """

    def __init__(self, quantizer: VectorQuantizer, config: QuantizerLossConfig, topology: Topology, accumulation: int):
        self.config, self.dim = config, quantizer.config.codebook_dim
        self.image_parts = topology.world_size * accumulation
        self.latent_parts = topology.data_size * accumulation
        self.scale_probe = torch.zeros((), device=topology.device, requires_grad=True)
        self._of_images: dict[str, Tensor] = {}
        self._scaled: dict[str, Tensor] = {}
        quantizer.entropy_latent.register_forward_hook(lambda module, inputs, latent: self._watched("entropy", latent))

    def add_images(self, name: str, gradient: Tensor, factor: Tensor | float = 1.0) -> None:
        """Tell the gradient of an image term at this rank's reconstruction, and what it is multiplied by."""
        self._of_images[name] = (gradient.norm() * factor).square() / self.image_parts

    def watch(self, output: TokenizerOutput) -> TokenizerOutput:
        """The same output for terms to look at, in whose features their gradients are met."""
        semantic = output.semantic_feature
        return output._replace(
            decoded_feature=self._watched("feature", output.decoded_feature),
            semantic_feature=None if semantic is None else self._watched("semantic", semantic),
        )

    def _watched(self, name: str, tensor: Tensor) -> Tensor:
        # In float32, where terms compare: in fp16 a gradient of a mean would underflow before it is measured.
        seen = tensor.float().view_as(tensor)
        if seen.requires_grad:
            seen.register_hook(partial(self._meet, name))
        return seen

    def _meet(self, name: str, gradient: Tensor) -> None:
        self._scaled[name] = gradient.norm()

    def take(self, terms: Mapping[str, Tensor], latents: int) -> dict[str, Tensor]:
        """Squared norms to log, after the backward pass of a micro batch with these terms and that many latents.

        The two mean squared errors need no hook: the gradient of w mean(d^2) over n elements is 2 w d / n, of
        squared length 4 w (w mean(d^2)) / n.
        """
        scale, self.scale_probe.grad = self.scale_probe.grad, None
        assert scale is not None, "the probe is not part of the loss"
        squares = {name: (norm / scale).square() / self.latent_parts for name, norm in self._scaled.items()}
        for name in ("codebook", "commitment"):
            squares[name] = 4 * getattr(self.config, name) * terms[name] / (latents * self.dim) / self.latent_parts
        squares |= self._of_images
        self._of_images, self._scaled = {}, {}
        return {PREFIX + name: square for name, square in squares.items()}


def norms(values: Mapping[str, float]) -> dict[str, float]:
    """What a window of steps logged, with the mean squares of `TermGradients` turned into norms."""
    return {name: value**0.5 if name.startswith(PREFIX) else value for name, value in values.items()}
