"""Where a GPT's codes come from: code shards, or image shards and a frozen tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gigatok_ds.checkpoint.class_names import ClassNames
from gigatok_ds.checkpoint.standalone import known_codes, load_tokenizer, read_config
from gigatok_ds.config.model import tokenizer_config_from_dict
from gigatok_ds.config.recipe import GPTRecipe
from gigatok_ds.config.sources import sources_of
from gigatok_ds.data.codes import CODE_EXTENSIONS, CodeBatches, CodeDataset
from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.joined import open_each, open_sources
from gigatok_ds.data.loader import ImageBatches, evaluation_batches
from gigatok_ds.data.prefetch import on_device
from gigatok_ds.data.reader import ReadingPlan
from gigatok_ds.errors import InputError
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.remote import check_data, open_shards
from gigatok_ds.shards.shard_cache import ShardCache

VALIDATION_BATCH = 32  # images that a rank encodes at once


class CodeSource(Protocol):
    @property
    def class_names(self) -> Sequence[str]:
        """What labels 0, 1, ... mean, where that is known."""

    def identity(self) -> dict[str, str]:
        """What tells the data from any other, by setting below `data`; see ShardIndex.identity."""

    def micro_batches(self, start_step: int) -> Iterator[dict[str, Tensor]]:
        """This data rank's endless micro batches: `codes` int64 (B, T), `labels` and, on the CPU, `position` (B,)."""

    @property
    def validation_names(self) -> Sequence[str]:
        """What the sets of validation images are called."""

    def validation(self, name: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Codes (N, T) and labels (N,) of all images of that set, or of the first one; collective."""


def check_sources(recipe: GPTRecipe) -> None:
    """Refuse, before any rank starts, a tokenizer that does not speak the GPT's codes, and a missing `second`."""
    data = recipe.data
    if data.second is not None:
        check_data("data.second", data.second, CODE_EXTENSIONS, ShardCache.of(data.cache, data.cache_gb, data.patience))
    if data.tokenizer is None:
        return
    description = read_config(data.tokenizer)
    if description.get("kind") != "tokenizer":
        raise InputError(f"data.tokenizer {data.tokenizer} holds a {description.get('kind')}, not a tokenizer")
    try:
        config = tokenizer_config_from_dict(description["model"])
    except (TypeError, KeyError) as error:
        raise InputError(f"data.tokenizer {data.tokenizer}: its config.json is not valid ({error})") from None
    _check_fit(recipe, f"data.tokenizer {data.tokenizer}",
               {"codebook_size": config.quantizer.codebook_size, "latent_tokens": config.latent_tokens})


def open_source(recipe: GPTRecipe, topology: Topology, micro_batch_size: int,
                classes: ClassNames = ClassNames()) -> CodeSource:
    """What the recipe's data section describes, for micro batches of that many sequences per data rank.

    Labels mean the same names in all of it: those of `classes` if there are any, else those of the training data.
    """
    kind = TokenizedImages if recipe.data.tokenizer else ExtractedCodes
    return kind(recipe, topology, micro_batch_size, classes)


def _check_fit(recipe: GPTRecipe, source: str, found: dict) -> None:
    expected = {"codebook_size": recipe.model.vocab_size, "latent_tokens": recipe.model.sequence_length}
    for name, value in expected.items():
        if found[name] != value:
            raise InputError(f"{source} has {name} {found[name]}, but {recipe.name} expects {value}")


def _maker(metadata: dict) -> str | None:
    """The `codes_sha256` of the tokenizer that has made code shards, if they say so."""
    try:
        return known_codes(metadata["provenance"]["tokenizer"]["provenance"])
    except (KeyError, TypeError, AttributeError):
        return None


class ExtractedCodes:
    """Code shards, with one of their augmentations for each access; validation takes the first."""

    def __init__(self, recipe: GPTRecipe, topology: Topology, micro_batch_size: int,
                 classes: ClassNames = ClassNames()):
        self.recipe, self.topology, self.micro_batch_size = recipe, topology, micro_batch_size
        data = recipe.data
        assert data.train is not None and data.validation is not None, "see check_run"
        parts: list[CodeDataset] = []
        self._makers: dict[str, str] = {}  # of codes, by their hash: a place that has them
        index, self.mixture = open_sources(data.train, partial(self._index_of, parts))
        train = CodeDataset.joined(parts, index) if self.mixture else parts[0]
        self.train = self._numbered(train, classes)
        known = classes if classes.names else ClassNames(self.train.index.classes, self.train.index.location)
        self.class_names = known.names
        self.held_out = {source.called: self._open(source.location, known) for source in sources_of(data.validation)}
        self.second = None if data.second is None else self._open(data.second, known)
        if self.second and not np.array_equal(self.second.labels, self.train.labels):
            raise InputError(f"data.second {data.second} is not of the same images as data.train {data.train}: it has "
                             f"{len(self.second)} samples beside {len(self.train)}, or other labels")

    @property
    def codes(self) -> dict[str, str]:
        """What tells the codes of this tokenizer from those of others, if they say so."""
        return {"codes": found} if (found := next(iter(self._makers), None)) else {}

    def _open(self, path: str, known: ClassNames) -> CodeDataset:
        """Code shards that fit this GPT, numbered by the names of its classes; InputError naming what differs."""
        return self._numbered(self._stored(path), known)

    def _stored(self, path: str) -> CodeDataset:
        data = self.recipe.data
        codes = CodeDataset.open(path, ShardCache.of(data.cache, data.cache_gb, data.patience))
        _check_fit(self.recipe, path, codes.metadata)
        if maker := _maker(codes.metadata):
            other = next((place for known, place in self._makers.items() if known != maker), None)
            if other:
                raise InputError(f"the codes in {path} are of another tokenizer than those in {other}; give codes of "
                                 "one")
            self._makers[maker] = path
        return codes

    def _index_of(self, parts: list[CodeDataset], path: str) -> ShardIndex:
        """The index of code shards, which are opened as the next of `parts`."""
        parts.append(self._stored(path))
        return parts[-1].index

    def _numbered(self, codes: CodeDataset, known: ClassNames) -> CodeDataset:
        codes = codes.number_as(known.names, known.source)
        codes.check_labels(self.recipe.model.num_classes)
        return codes

    def identity(self) -> dict[str, str]:
        """What tells the data from any other; see ShardIndex.identity."""
        parts = [self.train] if self.second is None else [self.train, self.second]
        return self.codes | {"train": "+".join(part.index.identity() for part in parts),
                "validation": "+".join(codes.index.identity() for codes in self.held_out.values())}

    def micro_batches(self, start_step: int) -> Iterator[dict[str, Tensor]]:
        training, topology = self.recipe.training, self.topology
        plan = ReadingPlan(global_batch_size=training.global_batch_size, micro_batch_size=self.micro_batch_size,
                           share=topology.data_share, start_step=start_step, stop_step=training.steps)
        batches = CodeBatches(self.train, plan, self.second, mixture=self.mixture, seed=training.seed,
                              workers=self.recipe.data.workers, pin_memory=topology.device.type == "cuda")
        return on_device(batches, ("codes", "labels"), topology.device)

    @property
    def validation_names(self) -> Sequence[str]:
        return list(self.held_out)

    def validation(self, name: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        held_out = self.held_out[name or self.validation_names[0]]
        return held_out.codes[:, 0], held_out.labels


class TokenizedImages:
    """Image shards, and a frozen tokenizer in float32. The tensor ranks of a data rank share the images to encode."""

    def __init__(self, recipe: GPTRecipe, topology: Topology, micro_batch_size: int,
                 classes: ClassNames = ClassNames()):
        self.recipe, self.topology = recipe, topology
        self.own_images = micro_batch_size // topology.tensor_size
        data, cache = recipe.data, ShardCache.of(recipe.data.cache, recipe.data.cache_gb, recipe.data.patience)
        assert data.train is not None and data.validation is not None and data.tokenizer is not None, "see check_run"
        self.train, self.mixture = open_sources(data.train, partial(open_shards, cache=cache,
                                                                    max_bad_fraction=data.max_bad_fraction))
        self.held_out = open_each(data.validation, partial(open_shards, cache=cache))
        self.train.number_as(classes.names, classes.source)
        known = classes if classes.names else ClassNames(self.train.classes, self.train.location)
        self.class_names = known.names
        self.train.check_labels(recipe.model.num_classes, data.max_bad_fraction)
        for index in self.held_out.values():
            index.number_as(known.names, known.source)
            index.check_labels(recipe.model.num_classes)
        self.tokenizer_path = Path(data.tokenizer)
        self.tokenizer = load_tokenizer(self.tokenizer_path, device=str(topology.device))
        self._encoded: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def identity(self) -> dict[str, str]:
        """What tells the data, and the tokenizer's weights, from any other; see ShardIndex.identity."""
        weights = json.dumps(read_config(self.tokenizer_path)["sha256"], sort_keys=True)
        codes = known_codes(read_config(self.tokenizer_path)["provenance"])
        return ({"codes": codes} if codes else {}) | {
                "train": self.train.identity(),
                "validation": "+".join(index.identity() for index in self.held_out.values()),
                "tokenizer": hashlib.sha256(weights.encode()).hexdigest()}

    def micro_batches(self, start_step: int) -> Iterator[dict[str, Tensor]]:
        data, training, topology = self.recipe.data, self.recipe.training, self.topology
        plan = ReadingPlan(global_batch_size=training.global_batch_size, micro_batch_size=self.own_images,
                           share=topology.image_share, start_step=start_step, stop_step=training.steps)
        batches = ImageBatches(
            self.train,
            training_transform(self.tokenizer.config.image_size, decoding=data.decoding, orient=data.orient),
            plan,
            mixture=self.mixture,
            num_classes=self.recipe.model.num_classes,
            shuffle_shards=data.shuffle_shards,
            max_bad_fraction=data.max_bad_fraction,
            as_bytes=True,
            seed=training.seed,
            workers=data.workers,
            pin_memory=topology.device.type == "cuda",
        )
        for batch in on_device(batches, ("images", "labels"), topology.device):
            codes, labels = self._encode(batch)
            first = int(batch["position"][0]) - topology.tensor_rank * self.own_images
            yield {"codes": codes, "labels": labels, "position": first + torch.arange(len(codes))}

    def _encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Codes and labels of the whole data rank's images."""
        device = self.topology.device
        codes = self.tokenizer.encode(batch["images"].to(device, non_blocking=True))
        table = self.topology.gather_images(torch.cat([codes, batch["labels"].to(device)[:, None]], dim=1))
        return table[:, :-1], table[:, -1]

    @property
    def validation_names(self) -> Sequence[str]:
        return list(self.held_out)

    def validation(self, name: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Codes and labels of the center crops; encoded once, by all ranks together."""
        name = name or self.validation_names[0]
        if name not in self._encoded:
            held_out = self.held_out[name]
            batches = evaluation_batches(held_out, self.tokenizer.config.image_size, VALIDATION_BATCH,
                                         self.topology.image_share, orient=self.recipe.data.orient,
                                         workers=self.recipe.data.workers,
                                         pin_memory=self.topology.device.type == "cuda")
            rounds = [[self.topology.gather_data(part).cpu() for part in self._encode(batch)] for batch in batches]
            # What fills up the last round comes last.
            codes, labels = (torch.cat(parts)[: len(held_out)].numpy() for parts in zip(*rounds, strict=True))
            self._encoded[name] = codes.astype(np.int32), labels
        return self._encoded[name]
