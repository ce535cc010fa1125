"""What a tokenizer's training consists of: two engines, frozen networks, images, validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gigatok_ds.checkpoint.class_names import ClassNames
from gigatok_ds.config.recipe import TokenizerRecipe
from gigatok_ds.cpu.convolution import use_winograd
from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.joined import open_each, open_sources
from gigatok_ds.data.loader import ImageBatches, evaluation_batches
from gigatok_ds.data.mixture import Mixture
from gigatok_ds.data.prefetch import on_device
from gigatok_ds.data.reader import ReadingPlan
from gigatok_ds.engine.compilation import called_twice, compile_of
from gigatok_ds.engine.engine import Engine
from gigatok_ds.evaluation.code_metrics import perplexity
from gigatok_ds.losses.composition import build_discriminator, build_objective
from gigatok_ds.models.quantizer import USAGE_WINDOW
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.models.tuning import tune_
from gigatok_ds.monitoring.flops import TokenizerFlops
from gigatok_ds.monitoring.previews import preview_grid
from gigatok_ds.parallel.recompute import recompute_
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.remote import open_shards
from gigatok_ds.shards.shard_cache import ShardCache
from gigatok_ds.streams import stream_key
from gigatok_ds.training.tokenizer_step import TokenizerStep
from gigatok_ds.training.validation_pass import SeveralValidations, TokenizerValidation

PROBE_IMAGES = 16


class Images(NamedTuple):
    """What a tokenizer is trained on and what it is validated on."""

    train: ShardIndex
    mixture: Mixture | None
    validation: dict[str, ShardIndex]  # by name

    def identity(self) -> dict[str, str]:
        """What tells the data from any other, by setting below `data`; see ShardIndex.identity."""
        return {"train": self.train.identity(),
                "validation": "+".join(index.identity() for index in self.validation.values())}


class TokenizerTask:
    """Generator (the tokenizer) and, if the recipe has one, discriminator: each an engine of its own."""

    class_names: Sequence[str] = ()  # labels are not learnt from

    def __init__(self, recipe: TokenizerRecipe, topology: Topology, settings: dict, images: Images):
        """`images` is what `open_data` has returned."""
        self.recipe, self.topology = recipe, topology
        # Of a data rank's micro batch, the images that this tensor rank reads, convolves and judges.
        self.own_images = settings["train_micro_batch_size_per_gpu"] // topology.tensor_size
        self.images = images
        self.validation_index = next(iter(images.validation.values()))  # of what is looked at
        seed, parallel = recipe.training.seed, recipe.parallel
        self.generator = Engine(
            lambda: tune_(Tokenizer(recipe.model, topology.layers), recipe.training), recipe.optimizer, settings,
            topology=topology, seed=seed,
            compile=compile_of(recipe.training.compile, topology.device, settings, twice=called_twice(recipe)),
            recompute=partial(recompute_, every_block=parallel.recompute_every, cnn=parallel.recompute_cnn),
            ema_decay=recipe.training.ema_decay,
        )
        self.engines = {"generator": self.generator}
        self.discriminator = None
        if recipe.loss.adversarial:
            # Its modules draw their initial weights themselves, from torch's generator.
            torch.manual_seed(stream_key(seed, "weights", "discriminator"))
            build = partial(build_discriminator, recipe.loss.adversarial, topology.layers,
                            image_size=recipe.model.image_size)
            self.discriminator = Engine(build, recipe.optimizer.of_discriminator, settings, topology=topology)
            self.engines["discriminator"] = self.discriminator
        self.objective = build_objective(recipe.loss, device=topology.device, grid=recipe.model.grid,
                                         precision=recipe.training.precision)
        if topology.device.type == "cpu":
            use_winograd(self.generator.network, self.objective)
        if compile := compile_of(recipe.training.compile, topology.device, settings):
            compile(self.objective)
        self.step = TokenizerStep(recipe, topology, self.generator, self.discriminator, self.objective,
                                  settings["gradient_accumulation_steps"])
        self.validation = SeveralValidations(
            {name: TokenizerValidation(recipe, index, self.objective.perceptual, topology, self.own_images)
             for name, index in images.validation.items()})
        self.flops = TokenizerFlops(recipe, self.objective, self.own_images, topology.device)

    @staticmethod
    def open_data(recipe: TokenizerRecipe, topology: Topology, settings: dict,
                  _classes: ClassNames = ClassNames()) -> Images:
        data, cache = recipe.data, ShardCache.of(recipe.data.cache, recipe.data.cache_gb, recipe.data.patience)
        assert data.train is not None and data.validation is not None, "see check_run"
        train, mixture = open_sources(data.train, partial(open_shards, cache=cache,
                                                          max_bad_fraction=data.max_bad_fraction), labelled=False)
        return Images(train, mixture, open_each(data.validation, partial(open_shards, cache=cache)))

    def micro_batches(self, start_step: int) -> Iterator[dict[str, Tensor]]:
        data, training, topology = self.recipe.data, self.recipe.training, self.topology
        plan = ReadingPlan(global_batch_size=training.global_batch_size, micro_batch_size=self.own_images,
                           share=topology.image_share, start_step=start_step, stop_step=training.steps)
        batches = ImageBatches(
            self.images.train,
            training_transform(self.recipe.model.image_size, data.crop_scale, data.flip, data.decoding,
                               orient=data.orient),
            plan,
            mixture=self.images.mixture,
            shuffle_shards=data.shuffle_shards,
            max_bad_fraction=data.max_bad_fraction,
            as_bytes=True,
            seed=training.seed,
            workers=data.workers,
            pin_memory=topology.device.type == "cuda",
        )
        return on_device(batches, ("images",), topology.device)

    def train_micro_batch(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        return self.step.train(batch["images"], batch["position"], step)

    def learning_rates(self, step: int, lr: float) -> dict[str, float]:
        if not self.discriminator or not self.recipe.loss.discriminator_active(step):
            return {"generator": lr}
        # The original first schedules the discriminator's rate after its first step.
        adversarial = self.recipe.loss.adversarial
        starts = adversarial is not None and step == adversarial.start_step
        return {"generator": lr, "discriminator": self.recipe.optimizer.lr if starts else lr}

    def validate(self, step: int) -> dict[str, float]:
        return self.validation.measure(self.generator.network, step)

    @torch.no_grad()
    def figures(self, step: int) -> dict[str, float]:
        """Perplexity of the usage window; codes that have not passed yet do not count."""
        quantizer, training = self.step.tokenizer.quantizer, self.recipe.training
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
        batch = next(iter(evaluation_batches(self.validation_index, self.recipe.model.image_size, size,
                                             orient=self.recipe.data.orient)))
        output = self.generator.network.eval()(topology.own_images(batch["images"]).to(topology.device))
        return batch["images"][:count], topology.gather_images(output.reconstruction)[:count], output.codes[:count]
