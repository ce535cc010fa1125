"""One training step of a GPT: cross-entropy of codes given the class."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gigatok_ds.config.recipe import GPTRecipe
from gigatok_ds.data.codes import CodeBatches, CodeDataset
from gigatok_ds.data.prefetch import on_device
from gigatok_ds.errors import InputError
from gigatok_ds.models.gpt import GPT
from gigatok_ds.parallel.dropout import dropout_at
from gigatok_ds.parallel.recompute import recompute_
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.streams import SampleDraws, torch_stream
from gigatok_ds.training.compile import compile_
from gigatok_ds.training.engine import Engine

PROBE_SEQUENCES = 16


class GPTTask:
    """A single engine over a GPT, fed with pre-extracted codes."""

    def __init__(self, recipe: GPTRecipe, topology: Topology, settings: dict):
        self.recipe, self.topology = recipe, topology
        self.micro_batch_size = settings["train_micro_batch_size_per_gpu"]
        self.train_codes = self._open(recipe.data.train)
        self.validation_codes = self._open(recipe.data.validation)
        parallel, mode = recipe.parallel, recipe.training.compile
        self.engine = Engine(
            lambda: GPT(recipe.model, topology.layers), recipe.optimizer, settings, topology=topology,
            seed=recipe.training.seed,
            compile=None if mode == "none" else partial(
                compile_, mode=mode, device=topology.device, stage=settings["zero_optimization"]["stage"]),
            recompute=partial(recompute_, every_block=parallel.recompute_every),
        )
        self.engines = {"gpt": self.engine}

    def _open(self, path: str) -> CodeDataset:
        """Code shards that fit this GPT; InputError naming what differs."""
        codes, model = CodeDataset.open(path), self.recipe.model
        expected = {"codebook_size": model.vocab_size, "latent_tokens": model.sequence_length}
        for name, value in expected.items():
            if codes.metadata[name] != value:
                raise InputError(f"{path} has {name} {codes.metadata[name]}, but {self.recipe.name} expects {value}")
        codes.check_labels(model.num_classes)
        return codes

    def micro_batches(self, start_step: int) -> Iterator[dict[str, Tensor]]:
        training = self.recipe.training
        batches = CodeBatches(
            self.train_codes,
            global_batch_size=training.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            seed=training.seed,
            workers=self.recipe.data.workers,
            pin_memory=self.topology.device.type == "cuda",
            data_rank=self.topology.data_rank,
            data_size=self.topology.data_size,
            start_step=start_step,
        )
        return on_device(batches, ("codes", "labels"), self.topology.device)

    def train_micro_batch(self, batch: dict[str, Tensor], step: int, lr: float) -> dict[str, Tensor]:
        device = self.topology.device
        codes, classes = batch["codes"].to(device), batch["labels"].to(device)
        self.engine.network.train()
        with dropout_at(self.recipe.training.seed, batch["position"].to(device, non_blocking=True)):
            classes = self._drop_classes(classes, batch["position"], step)
            loss = self.engine(codes[:, :-1], classes, codes).mean()
            self.engine.backward(loss)
        self.engine.step(lr)
        return {"loss": loss}

    def _drop_classes(self, classes: Tensor, positions: Tensor, step: int) -> Tensor:
        """Replace some classes by "no class", so that the model also learns to run without guidance."""
        training = self.recipe.training
        stream = torch_stream(training.seed, "class-dropout", step)
        draws = SampleDraws(stream, training.global_batch_size, positions % training.global_batch_size)
        dropped = draws.per_sample(1)[0] < self.recipe.model.class_dropout
        return torch.where(dropped.to(classes.device), self.recipe.model.num_classes, classes)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean cross-entropy, in nats per code, of the first augmentation of every validation sequence."""
        network = self.engine.network.eval()
        codes, labels = self.validation_codes.codes[:, 0], self.validation_codes.labels
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
        return {"loss": float(total[0] / total[1])}

    @torch.no_grad()
    def probe(self) -> dict[str, np.ndarray]:
        codes = torch.as_tensor(self.validation_codes.codes[:PROBE_SEQUENCES, 0]).long()
        labels = torch.as_tensor(self.validation_codes.labels[:PROBE_SEQUENCES]).long()
        device = self.topology.device
        logits = self.engine.network.eval()(codes[:, :-1].to(device), labels.to(device))
        return {"codes": codes.numpy(), "classes": labels.numpy(), "logits": logits.cpu().numpy()}
