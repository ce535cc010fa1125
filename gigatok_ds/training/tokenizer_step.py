"""One micro batch of a tokenizer: reconstruction, quantizer, semantic and adversarial terms over two engines."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from gigatok_ds.config.recipe import TokenizerRecipe
from gigatok_ds.losses.adaptive import adaptive_weight, kernel_gradient
from gigatok_ds.losses.composition import TokenizerObjective, lecam_of
from gigatok_ds.models.tokenizer import Tokenizer, TokenizerOutput
from gigatok_ds.monitoring.loss_term_gradients import TermGradients
from gigatok_ds.monitoring.metrics import NOT_FINITE
from gigatok_ds.parallel.dropout import dropout_at
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.streams import SampleDraws, torch_stream
from gigatok_ds.transfer import to_device

# Gradients of a mean over many logits would underflow on their way through a discriminator in fp16.
FP16_IMAGE_SCALE = 4096.0


class Trained(Protocol):
    """What a step needs of an engine: its network, called as the engine is called, and a backward pass."""

    @property
    def network(self) -> nn.Module: ...

    def __call__(self, *inputs, **options): ...

    def backward(self, loss: Tensor) -> None: ...


class TokenizerStep:
    """Forward and backward passes of generator (the tokenizer) and, if there is one, discriminator."""

    def __init__(self, recipe: TokenizerRecipe, topology: Topology, generator: Trained, discriminator: Trained | None,
                 objective: TokenizerObjective, accumulation: int):
        self.recipe, self.topology, self.objective = recipe, topology, objective
        self.generator, self.discriminator = generator, discriminator
        self.image_scale = FP16_IMAGE_SCALE if recipe.training.precision == "fp16" else 1.0
        assert isinstance(generator.network, Tokenizer)
        self.tokenizer = generator.network
        self.last_layer = LastLayer(self.tokenizer.cnn_decoder.conv_out)
        self.term_gradients = TermGradients(self.tokenizer.quantizer, recipe.loss.quantizer, topology, accumulation)

    def train(self, images: Tensor, positions: Tensor, step: int) -> dict[str, Tensor]:
        """Passes over this rank's images (B, 3, S, S) in [-1, 1] in a step (1-based); scalars to log, `loss` among
        them.

        positions (B,): the images' places in the course of training.
        """
        images = to_device(images, self.topology.device)
        own = to_device(positions, images.device)
        numbers = self.topology.gather_images(own)
        with dropout_at(self.recipe.training.seed, numbers, own):
            output, logged = self._generator_pass(images, positions, step)
        if self.discriminator and self.recipe.loss.discriminator_active(step):
            logged |= self._discriminator_pass(self.discriminator, images, output, positions, step)
        codes = self.topology.gather_data(output.codes)
        logged["codebook_usage"] = self.tokenizer.quantizer.record_usage(codes)
        logged[NOT_FINITE] = (codes < 0).sum()
        return logged

    def _generator_pass(self, images: Tensor, positions: Tensor, step: int):
        """Forward and backward of the tokenizer.

        The image losses are differentiated down to the reconstruction only, in float32 and outside the engine, and
        enter its backward pass as <reconstruction, gradient>. The gradient in the tokenizer is the same, and no
        ZeRO stage sees a partial backward pass. They are means over this rank's images, of which each tensor rank has
        its share; the other terms are of the data rank's whole batch, alike on its tensor ranks.
        """
        self.tokenizer.train()
        output = self.generator(
            images,
            entropy=self.recipe.loss.wants_entropy(step),
            semantic=self.recipe.loss.semantic is not None,
            direct=self.recipe.loss.wants_direct_reconstruction(step),
        )
        outputs = [image for image in (output.reconstruction, output.direct_reconstruction) if image is not None]
        leaves = [leaf_of(image) for image in outputs]
        image_terms = self.objective.image_terms(images, leaves[0], leaves[1] if len(leaves) > 1 else None,
                                                 self._frozen_discriminator(positions, step), step)
        gradients, extra = self._image_gradients(image_terms, leaves)
        surrogates = [(image.float() * gradient).sum() for image, gradient in zip(outputs, gradients, strict=True)]
        target = self.topology.gather_images(self.objective.teacher(images)) if self.objective.teacher else None
        latent_terms = self.objective.latent_terms(self.term_gradients.watch(output), target, step)
        self.generator.backward(sum(surrogates) / self.topology.tensor_size + sum(latent_terms.values())
                                + self.term_gradients.scale_probe)
        extra |= self.term_gradients.take(latent_terms, output.codes.numel())
        terms = image_terms | latent_terms
        weight = extra.get("adaptive_weight", 1.0)
        loss = sum(value.detach() * (weight if name.endswith("adversarial") else 1.0) for name, value in terms.items())
        return output, {"loss": loss} | {f"loss/{name}": value for name, value in terms.items()} | extra

    def _image_gradients(self, terms: dict[str, Tensor], leaves: list[Tensor]):
        """Gradients of the image losses at the leaves, and what there is to log about them.

        Each term is differentiated by itself, which costs nothing more: their graphs meet only in the leaves. With an
        adaptive weight the adversarial terms count by the ratio of gradient lengths at the last layer.
        """
        by_term = {name: self._gradient(value, leaves[name.startswith("direct_")]) for name, value in terms.items()}
        plain, adversarial = (
            [sum(gradient for name, gradient in by_term.items()
                 if (name.endswith("adversarial"), name.startswith("direct_")) == (side, direct))
             for direct in (False, True)[: len(leaves)]]
            for side in (False, True)
        )
        passes, config = self.last_layer.take_inputs(), self.recipe.loss.adversarial
        weight: Tensor | float = 1.0
        extra = {}
        if "adversarial" in terms and config and config.adaptive_weight:
            of_kernel = [self.topology.mean_over_ranks(kernel_gradient(
                self.last_layer.layer, ((x, gradient) for x, gradient in zip(passes, gradients, strict=False)
                                        if isinstance(gradient, Tensor))))
                         for gradients in (plain, adversarial)]
            # The weight compares the losses themselves, so the fixed weight is taken out of the adversarial side.
            weight = adaptive_weight(of_kernel[0], of_kernel[1] / config.weight)
            extra["adaptive_weight"] = weight
        for name, gradient in by_term.items():
            self.term_gradients.add_images(name, gradient, weight if name.endswith("adversarial") else 1.0)
        return [ours + weight * theirs for ours, theirs in zip(plain, adversarial, strict=True)], extra

    def _gradient(self, term: Tensor, leaf: Tensor) -> Tensor:
        return torch.autograd.grad(self.image_scale * term, leaf)[0] / self.image_scale

    def _frozen_discriminator(self, positions: Tensor, step: int):
        """The discriminator for the generator's step: its parameters take no gradient."""
        if not self.discriminator or not self.recipe.loss.discriminator_active(step):
            return None
        network = self.discriminator.network.train()
        draws = self._augmentation_draws("generator", positions, step)

        def discriminate(images: Tensor) -> Tensor:
            network.requires_grad_(False)
            try:
                return network(images, draws)
            finally:
                network.requires_grad_(True)

        return discriminate

    def _discriminator_pass(self, discriminator: Trained, images: Tensor, output: TokenizerOutput, positions: Tensor,
                            step: int) -> dict[str, Tensor]:
        draws = self._augmentation_draws("discriminator", positions, step)
        direct = output.direct_reconstruction
        terms = self.objective.discriminator_terms(
            discriminator(images, draws),
            discriminator(output.reconstruction.detach(), draws),
            None if direct is None else discriminator(direct.detach(), draws),
            step,
            lecam=lecam_of(discriminator.network),
        )
        total = sum(terms.values())
        assert isinstance(total, Tensor)  # there is always the discriminator's own
        discriminator.backward(total / self.topology.tensor_size)
        return {f"discriminator/{name}": value for name, value in terms.items()}

    def _augmentation_draws(self, side: str, positions: Tensor, step: int) -> SampleDraws:
        training = self.recipe.training
        stream = torch_stream(training.seed, "discriminator-augmentation", side, step)
        return SampleDraws(stream, training.global_batch_size, positions % training.global_batch_size)


class LastLayer:
    """Remembers what went into a layer since it was last asked."""

    def __init__(self, layer: nn.Conv2d):
        self.layer = layer
        self._inputs: list[Tensor] = []
        layer.register_forward_pre_hook(self._remember)

    def _remember(self, layer: nn.Conv2d, inputs: tuple[Tensor]) -> None:
        if layer.training:
            self._inputs.append(inputs[0].detach())

    def take_inputs(self) -> list[Tensor]:
        inputs, self._inputs = self._inputs, []
        return inputs


def leaf_of(tensor: Tensor) -> Tensor:
    """A float32 copy of `tensor` that starts a graph of its own."""
    return tensor.detach().float().requires_grad_()
