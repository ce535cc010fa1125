"""One training step of a GPT: cross-entropy of codes given the class."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gigatok_ds.checkpoint.class_names import ClassNames
from gigatok_ds.config.recipe import GPTRecipe
from gigatok_ds.engine.compilation import compile_of
from gigatok_ds.engine.engine import Engine
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tuning import tune_
from gigatok_ds.monitoring.flops import GPTFlops
from gigatok_ds.parallel.dropout import dropout_at
from gigatok_ds.parallel.recompute import recompute_
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.streams import SampleDraws, torch_stream
from gigatok_ds.training.code_sources import CodeSource, open_source
from gigatok_ds.transfer import to_device

PROBE_SEQUENCES = 16


class GPTTask:
    """A single engine over a GPT, fed with pre-extracted codes or with those of a frozen tokenizer."""

    def __init__(self, recipe: GPTRecipe, topology: Topology, settings: dict, source: CodeSource):
        """`source` is what `open_data` has returned."""
        self.recipe, self.topology, self.source = recipe, topology, source
        self.micro_batch_size = settings["train_micro_batch_size_per_gpu"]
        self.class_names = source.class_names[: recipe.model.num_classes]
        self.engine = Engine(
            lambda: tune_(GPT(recipe.model, topology.layers), recipe.training, topology.layers), recipe.optimizer,
            settings, topology=topology, seed=recipe.training.seed,
            compile=compile_of(recipe.training.compile, topology.device, settings),
            recompute=partial(recompute_, every_block=recipe.parallel.recompute_every),
            ema_decay=recipe.training.ema_decay,
        )
        self.engines = {"gpt": self.engine}
        self.flops = GPTFlops(recipe)

    @staticmethod
    def open_data(recipe: GPTRecipe, topology: Topology, settings: dict,
                  classes: ClassNames = ClassNames()) -> CodeSource:
        """classes: what a model that training goes on with calls them; labels are those of the same names."""
        return open_source(recipe, topology, settings["train_micro_batch_size_per_gpu"], classes)

    def micro_batches(self, start_step: int) -> Iterator[dict[str, Tensor]]:
        return self.source.micro_batches(start_step)

    def train_micro_batch(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        device = self.topology.device
        codes, classes = to_device(batch["codes"], device), to_device(batch["labels"], device)
        self.engine.network.train()
        with dropout_at(self.recipe.training.seed, to_device(batch["position"], device)):
            classes = self._drop_classes(classes, batch["position"], step)
            loss = self.engine(codes[:, :-1], classes, codes).mean()
            self.engine.backward(loss)
        return {"loss": loss}

    def learning_rates(self, step: int, lr: float) -> dict[str, float]:
        return {"gpt": lr}

    def _drop_classes(self, classes: Tensor, positions: Tensor, step: int) -> Tensor:
        """Replace some classes by "no class", so that the model also learns to run without guidance."""
        training = self.recipe.training
        stream = torch_stream(training.seed, "class-dropout", step)
        draws = SampleDraws(stream, training.global_batch_size, positions % training.global_batch_size)
        dropped = draws.per_sample(1)[0] < self.recipe.model.class_dropout
        return classes.masked_fill(to_device(dropped, classes.device), self.recipe.model.num_classes)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Mean cross-entropy, in nats per code, of validation images: their first augmentation or center crop. Of the
        first set it is `loss`, of others `loss.NAME`.
        """
        return {"loss" if number == 0 else f"loss.{name}": self._loss(*self.source.validation(name))
                for number, name in enumerate(self.source.validation_names)}

    def _loss(self, codes: np.ndarray, labels: np.ndarray) -> float:
        network = self.engine.network.eval()
        rank, ranks, size = self.topology.data_rank, self.topology.data_size, self.micro_batch_size
        total = torch.zeros(2, dtype=torch.float64)
        # Every rank runs as many batches as the others; those past the end repeat the last sequence uncounted.
        for start in range(0, -(-len(codes) // (size * ranks)) * size * ranks, size * ranks):
            wanted = torch.arange(start + rank * size, start + (rank + 1) * size)
            valid = wanted < len(codes)
            rows = wanted.clamp(max=len(codes) - 1)
            batch = torch.as_tensor(codes[rows]).long().to(self.topology.device)
            losses = network(batch[:, :-1], torch.as_tensor(labels[rows]).long().to(self.topology.device), batch)
            total += torch.stack([losses.cpu()[valid].double().sum(), valid.sum() * batch.shape[1]])
        total = self.topology.mean_over_ranks(total.to(self.topology.device)).cpu()
        return float(total[0] / total[1])

    def figures(self, step: int) -> dict[str, float]:
        return {}

    def preview(self) -> None:
        return None

    @torch.no_grad()
    def probe(self) -> dict[str, np.ndarray]:
        codes, labels = (torch.as_tensor(part[:PROBE_SEQUENCES]).long() for part in self.source.validation())
        device = self.topology.device
        logits = self.engine.network.eval()(codes[:, :-1].to(device), labels.to(device))
        return {"codes": codes.numpy(), "classes": labels.numpy(), "logits": logits.cpu().numpy()}
