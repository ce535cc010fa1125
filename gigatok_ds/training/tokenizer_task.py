"""One training step of a tokenizer: reconstruction, quantizer, semantic and adversarial terms over two engines."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gigatok_ds.config.recipe import TokenizerRecipe
from gigatok_ds.data.index import ShardIndex
from gigatok_ds.data.loader import ImageBatches, evaluation_batches
from gigatok_ds.data.transforms import training_transform
from gigatok_ds.evaluation.code_metrics import codebook_usage, perplexity
from gigatok_ds.evaluation.image_metrics import psnr
from gigatok_ds.losses.composition import build_discriminator, build_objective
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.streams import stream_key, torch_stream
from gigatok_ds.training.engine import Engine

PROBE_IMAGES = 16
# Gradients of a mean over many logits would underflow on their way through a discriminator in fp16.
FP16_IMAGE_SCALE = 4096.0


class TokenizerTask:
    """Generator (the tokenizer) and, if the recipe has one, discriminator: each an engine of its own."""

    def __init__(self, recipe: TokenizerRecipe, topology: Topology, settings: dict):
        self.recipe, self.topology = recipe, topology
        self.micro_batch_size = settings["train_micro_batch_size_per_gpu"]
        self.train_index = ShardIndex.open(recipe.data.train)
        self.validation_index = ShardIndex.open(recipe.data.validation)
        self.image_scale = FP16_IMAGE_SCALE if recipe.training.precision == "fp16" else 1.0
        seed = recipe.training.seed
        self.engines = {"generator": Engine(lambda: Tokenizer(recipe.model), recipe.optimizer, settings, seed=seed)}
        self.generator = self.engines["generator"]
        self.discriminator = None
        if recipe.loss.adversarial:
            # Its modules draw their initial weights themselves, from torch's generator.
            torch.manual_seed(stream_key(seed, "weights", "discriminator"))
            build = partial(build_discriminator, recipe.loss.adversarial)
            self.discriminator = self.engines["discriminator"] = Engine(build, recipe.optimizer, settings)
        self.objective = build_objective(recipe.loss, device=topology.device)

    def micro_batches(self, start_step: int) -> Iterator[dict[str, Tensor]]:
        data, training = self.recipe.data, self.recipe.training
        return iter(ImageBatches(
            self.train_index,
            training_transform(self.recipe.model.image_size, data.crop_scale, data.flip),
            global_batch_size=training.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            seed=training.seed,
            workers=data.workers,
            pin_memory=self.topology.device.type == "cuda",
            data_rank=self.topology.data_rank,
            data_size=self.topology.data_size,
            start_step=start_step,
        ))

    def train_micro_batch(self, batch: dict[str, Tensor], step: int, micro: int, lr: float) -> dict[str, Tensor]:
        images = batch["images"].to(self.topology.device, non_blocking=True)
        output, logged = self._generator_pass(images, step, micro)
        self.generator.step(lr)
        if self.discriminator and self.objective.discriminator_active(step):
            logged |= self._discriminator_pass(images, output, step, micro)
            self.discriminator.step(lr)
        codes = self.topology.gather_data(output.codes)
        logged["codebook_usage"] = self.generator.network.quantizer.record_usage(codes)
        return logged

    def _generator_pass(self, images: Tensor, step: int, micro: int):
        """Forward and backward of the tokenizer.

        The image losses are differentiated down to the reconstruction only, in float32 and outside the engine, and
        enter its backward pass as <reconstruction, gradient>. The gradient in the tokenizer is the same, and no
        ZeRO stage sees a partial backward pass.
        """
        self.generator.network.train()
        output = self.generator(
            images,
            entropy=self.objective.wants_entropy(step),
            semantic=self.recipe.loss.semantic is not None,
            direct=self.objective.wants_direct_reconstruction(step),
        )
        leaves = [leaf_of(output.reconstruction)]
        if output.direct_reconstruction is not None:
            leaves.append(leaf_of(output.direct_reconstruction))
        direct_leaf = leaves[1] if len(leaves) > 1 else None
        image_terms = self.objective.image_terms(images, leaves[0], direct_leaf, self._frozen_judge(step, micro), step)
        gradients = [gradient / self.image_scale for gradient in
                     torch.autograd.grad(self.image_scale * sum(image_terms.values()), leaves)]
        latent_terms = self.objective.latent_terms(output, images, step)
        surrogate = (output.reconstruction.float() * gradients[0]).sum()
        if direct_leaf is not None:
            surrogate = surrogate + (output.direct_reconstruction.float() * gradients[1]).sum()
        self.generator.backward(surrogate + sum(latent_terms.values()))
        terms = {f"loss/{name}": value for name, value in (image_terms | latent_terms).items()}
        return output, {"loss": sum(value.detach() for value in terms.values())} | terms

    def _frozen_judge(self, step: int, micro: int):
        """The discriminator for the generator's step: its parameters take no gradient."""
        if not self.discriminator or not self.objective.discriminator_active(step):
            return None
        network = self.discriminator.network.train()
        generator = self._augmentation_stream("generator", step, micro)

        def judge(images: Tensor) -> Tensor:
            network.requires_grad_(False)
            try:
                return network(images, generator)
            finally:
                network.requires_grad_(True)

        return judge

    def _discriminator_pass(self, images: Tensor, output, step: int, micro: int) -> dict[str, Tensor]:
        stream = self._augmentation_stream("discriminator", step, micro)
        direct = output.direct_reconstruction
        terms = self.objective.discriminator_terms(
            self.discriminator(images, stream),
            self.discriminator(output.reconstruction.detach(), stream),
            None if direct is None else self.discriminator(direct.detach(), stream),
            step,
        )
        self.discriminator.backward(sum(terms.values()))
        return {f"discriminator/{name}": value for name, value in terms.items()}

    def _augmentation_stream(self, side: str, *address: int) -> torch.Generator:
        return torch_stream(self.recipe.training.seed, "discriminator-augmentation", side, *address,
                            self.topology.data_rank)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean PSNR of the validation images, and how the codebook serves them."""
        network = self.generator.network.eval()
        size = self.recipe.model.quantizer.codebook_size
        total, images, codes = torch.zeros(2), 0, []
        for batch in evaluation_batches(self.validation_index, self.recipe.model.image_size, self.micro_batch_size,
                                        self.topology.data_rank, self.topology.data_size):
            pixels = batch["images"].to(self.topology.device)
            output = network(pixels)
            valid = batch["valid"]
            values = psnr(pixels, output.reconstruction.float()).cpu()
            total += torch.tensor([values[valid].sum(), valid.sum()])
            codes.append(torch.where(valid[:, None], output.codes.cpu(), -1))
        total = self.topology.mean_over_data(total.to(self.topology.device)).cpu()
        everything = self.topology.gather_data(torch.cat(codes).to(self.topology.device)).cpu()
        everything = everything[everything[:, 0] >= 0]
        return {
            "psnr": float(total[0] / total[1]),
            "codebook_usage": codebook_usage(everything, size),
            "codebook_perplexity": perplexity(everything, size),
        }

    @torch.no_grad()
    def probe(self) -> dict[str, np.ndarray]:
        batch = next(iter(evaluation_batches(self.validation_index, self.recipe.model.image_size, PROBE_IMAGES)))
        output = self.generator.network.eval()(batch["images"].to(self.topology.device))
        return {
            "images": batch["images"].numpy(),
            "codes": output.codes.cpu().numpy(),
            "reconstruction": output.reconstruction.float().cpu().numpy(),
        }


def leaf_of(tensor: Tensor) -> Tensor:
    """A float32 copy of `tensor` that starts a graph of its own."""
    return tensor.detach().float().requires_grad_()
