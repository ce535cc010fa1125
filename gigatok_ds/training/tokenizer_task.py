"""One training step of a tokenizer: reconstruction, quantizer, semantic and adversarial terms over two engines."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from gigatok_ds.config.recipe import TokenizerRecipe
from gigatok_ds.data.loader import ImageBatches, evaluation_batches
from gigatok_ds.data.prefetch import on_device
from gigatok_ds.data.remote import open_shards
from gigatok_ds.data.shard_cache import ShardCache
from gigatok_ds.data.transforms import training_transform
from gigatok_ds.evaluation.code_metrics import perplexity
from gigatok_ds.losses.adaptive import adaptive_weight, kernel_gradient
from gigatok_ds.losses.composition import build_discriminator, build_objective
from gigatok_ds.models.quantizer import USAGE_WINDOW
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.parallel.dropout import dropout_at
from gigatok_ds.parallel.recompute import recompute_
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.streams import SampleDraws, stream_key, torch_stream
from gigatok_ds.training.compile import compile_of
from gigatok_ds.training.engine import Engine
from gigatok_ds.training.flops import TokenizerFlops
from gigatok_ds.training.monitor import NOT_FINITE
from gigatok_ds.training.previews import preview_grid
from gigatok_ds.training.term_gradients import TermGradients
from gigatok_ds.training.validation import TokenizerValidation

PROBE_IMAGES = 16
# Gradients of a mean over many logits would underflow on their way through a discriminator in fp16.
FP16_IMAGE_SCALE = 4096.0


class TokenizerTask:
    """Generator (the tokenizer) and, if the recipe has one, discriminator: each an engine of its own."""

    def __init__(self, recipe: TokenizerRecipe, topology: Topology, settings: dict):
        self.recipe, self.topology = recipe, topology
        # Of a data rank's micro batch, the images that this tensor rank reads, convolves and judges.
        self.own_images = settings["train_micro_batch_size_per_gpu"] // topology.tensor_size
        data, cache = recipe.data, ShardCache.of(recipe.data.cache, recipe.data.cache_gb)
        self.train_index = open_shards(data.train, cache=cache, max_bad_fraction=data.max_bad_fraction)
        self.validation_index = open_shards(data.validation, cache=cache)
        self.image_scale = FP16_IMAGE_SCALE if recipe.training.precision == "fp16" else 1.0
        seed, parallel = recipe.training.seed, recipe.parallel
        self.generator = Engine(
            lambda: Tokenizer(recipe.model, topology.layers), recipe.optimizer, settings, topology=topology, seed=seed,
            compile=compile_of(recipe.training.compile, topology.device, settings),
            recompute=partial(recompute_, every_block=parallel.recompute_every, cnn=parallel.recompute_cnn),
            ema_decay=recipe.training.ema_decay,
        )
        self.engines = {"generator": self.generator}
        self.last_layer = LastLayer(self.generator.network.cnn_decoder.conv_out)
        self.term_gradients = TermGradients(self.generator.network.quantizer, recipe.loss.quantizer, topology,
                                            settings["gradient_accumulation_steps"])
        self.discriminator = None
        if recipe.loss.adversarial:
            # Its modules draw their initial weights themselves, from torch's generator.
            torch.manual_seed(stream_key(seed, "weights", "discriminator"))
            build = partial(build_discriminator, recipe.loss.adversarial, topology.layers,
                            image_size=recipe.model.image_size)
            self.discriminator = Engine(build, recipe.optimizer, settings, topology=topology)
            self.engines["discriminator"] = self.discriminator
        self.objective = build_objective(recipe.loss, device=topology.device, grid=recipe.model.grid,
                                         precision=recipe.training.precision)
        self.validation = TokenizerValidation(recipe, self.validation_index, self.objective.perceptual, topology,
                                              self.own_images)
        self.flops = TokenizerFlops(recipe, self.objective, self.own_images, topology.device)

    def data_identity(self) -> str:
        return self.train_index.identity()

    def micro_batches(self, start_step: int) -> Iterator[dict[str, Tensor]]:
        data, training, topology = self.recipe.data, self.recipe.training, self.topology
        # A data rank's tensor ranks are neighbours, so all ranks in their order share its micro batch in its order.
        batches = ImageBatches(
            self.train_index,
            training_transform(self.recipe.model.image_size, data.crop_scale, data.flip, data.decoding),
            shuffle_shards=data.shuffle_shards,
            max_bad_fraction=data.max_bad_fraction,
            as_bytes=True,
            global_batch_size=training.global_batch_size,
            micro_batch_size=self.own_images,
            seed=training.seed,
            workers=data.workers,
            pin_memory=topology.device.type == "cuda",
            data_rank=topology.rank,
            data_size=topology.world_size,
            start_step=start_step,
            stop_step=training.steps,
        )
        return on_device(batches, ("images",), topology.device)

    def train_micro_batch(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        images = batch["images"].to(self.topology.device, non_blocking=True)
        positions = batch["position"]
        numbers = self.topology.gather_images(positions.to(images.device, non_blocking=True))
        with dropout_at(self.recipe.training.seed, numbers):
            output, logged = self._generator_pass(images, positions, step)
        if self.discriminator and self.objective.discriminator_active(step):
            logged |= self._discriminator_pass(images, output, positions, step)
        codes = self.topology.gather_data(output.codes)
        logged["codebook_usage"] = self.generator.network.quantizer.record_usage(codes)
        logged[NOT_FINITE] = (codes < 0).sum()
        return logged

    def learning_rates(self, step: int, lr: float) -> dict[str, float]:
        if not self.discriminator or not self.objective.discriminator_active(step):
            return {"generator": lr}
        # The original first schedules the discriminator's rate after its first step.
        starts = step == self.recipe.loss.adversarial.start_step
        return {"generator": lr, "discriminator": self.recipe.optimizer.lr if starts else lr}

    def _generator_pass(self, images: Tensor, positions: Tensor, step: int):
        """Forward and backward of the tokenizer.

        The image losses are differentiated down to the reconstruction only, in float32 and outside the engine, and
        enter its backward pass as <reconstruction, gradient>. The gradient in the tokenizer is the same, and no
        ZeRO stage sees a partial backward pass. They are means over this rank's images, of which each tensor rank has
        its share; the other terms are of the data rank's whole batch, alike on its tensor ranks.
        """
        self.generator.network.train()
        output = self.generator(
            images,
            entropy=self.objective.wants_entropy(step),
            semantic=self.recipe.loss.semantic is not None,
            direct=self.objective.wants_direct_reconstruction(step),
        )
        outputs = [image for image in (output.reconstruction, output.direct_reconstruction) if image is not None]
        leaves = [leaf_of(image) for image in outputs]
        image_terms = self.objective.image_terms(images, leaves[0], leaves[1] if len(leaves) > 1 else None,
                                                 self._frozen_judge(positions, step), step)
        gradients, extra = self._image_gradients(image_terms, leaves)
        surrogates = [(image.float() * gradient).sum() for image, gradient in zip(outputs, gradients)]
        target = self.topology.gather_images(self.objective.teacher(images)) if self.objective.teacher else None
        latent_terms = self.objective.latent_terms(self.term_gradients.watch(output), target, step)
        self.generator.backward(sum(surrogates) / self.topology.tensor_size + sum(latent_terms.values())
                                + self.term_gradients.scale_probe)
        extra |= self.term_gradients.take(latent_terms, output.codes.numel())
        terms = {f"loss/{name}": value for name, value in (image_terms | latent_terms).items()}
        return output, {"loss": sum(value.detach() for value in terms.values())} | terms | extra

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
        weight, extra = 1.0, {}
        if "adversarial" in terms and config.adaptive_weight:
            of_kernel = [self.topology.mean_over_ranks(kernel_gradient(self.last_layer.layer, zip(passes, gradients)))
                         for gradients in (plain, adversarial)]
            # The weight compares the losses themselves, so the fixed weight is taken out of the adversarial side.
            weight = adaptive_weight(of_kernel[0], of_kernel[1] / config.weight)
            extra["adaptive_weight"] = weight
        for name, gradient in by_term.items():
            self.term_gradients.add_images(name, gradient, weight if name.endswith("adversarial") else 1.0)
        return [ours + weight * theirs for ours, theirs in zip(plain, adversarial)], extra

    def _gradient(self, term: Tensor, leaf: Tensor) -> Tensor:
        return torch.autograd.grad(self.image_scale * term, leaf)[0] / self.image_scale

    def _frozen_judge(self, positions: Tensor, step: int):
        """The discriminator for the generator's step: its parameters take no gradient."""
        if not self.discriminator or not self.objective.discriminator_active(step):
            return None
        network = self.discriminator.network.train()
        draws = self._augmentation_draws("generator", positions, step)

        def judge(images: Tensor) -> Tensor:
            network.requires_grad_(False)
            try:
                return network(images, draws)
            finally:
                network.requires_grad_(True)

        return judge

    def _discriminator_pass(self, images: Tensor, output, positions: Tensor, step: int) -> dict[str, Tensor]:
        draws = self._augmentation_draws("discriminator", positions, step)
        direct = output.direct_reconstruction
        terms = self.objective.discriminator_terms(
            self.discriminator(images, draws),
            self.discriminator(output.reconstruction.detach(), draws),
            None if direct is None else self.discriminator(direct.detach(), draws),
            step,
            lecam=self.discriminator.network.lecam,
        )
        self.discriminator.backward(sum(terms.values()) / self.topology.tensor_size)
        return {f"discriminator/{name}": value for name, value in terms.items()}

    def _augmentation_draws(self, side: str, positions: Tensor, step: int) -> SampleDraws:
        training = self.recipe.training
        stream = torch_stream(training.seed, "discriminator-augmentation", side, step)
        return SampleDraws(stream, training.global_batch_size, positions % training.global_batch_size)

    def validate(self, step: int) -> dict[str, float]:
        return self.validation.measure(self.generator.network, step)

    @torch.no_grad()
    def figures(self, step: int) -> dict[str, float]:
        """Perplexity of the usage window; codes that have not passed yet do not count."""
        quantizer, training = self.generator.network.quantizer, self.recipe.training
        passed = step * training.global_batch_size * self.recipe.model.latent_tokens
        codes = quantizer.codebook_used[-min(passed, USAGE_WINDOW):]
        return {"codebook_perplexity": perplexity(codes, quantizer.config.codebook_size)}

    def preview(self) -> np.ndarray | None:
        """The first monitor.preview_images validation images above their reconstructions."""
        count = min(self.recipe.monitor.preview_images, len(self.validation_index))
        return preview_grid(*self._reconstructed(count)[:2]) if count else None

    def probe(self) -> dict[str, np.ndarray]:
        images, reconstruction, codes = self._reconstructed(PROBE_IMAGES)
        return {"images": images.numpy(), "codes": codes.cpu().numpy(),
                "reconstruction": reconstruction.float().cpu().numpy()}

    @torch.no_grad()
    def _reconstructed(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first `count` validation images (the last one repeated, if there are fewer), what becomes of them, and
        their codes; alike on all ranks."""
        topology = self.topology
        size = -(-count // topology.tensor_size) * topology.tensor_size
        batch = next(iter(evaluation_batches(self.validation_index, self.recipe.model.image_size, size)))
        output = self.generator.network.eval()(topology.own_images(batch["images"]).to(topology.device))
        return batch["images"][:count], topology.gather_images(output.reconstruction)[:count], output.codes[:count]


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
