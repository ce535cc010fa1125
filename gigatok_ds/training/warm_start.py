"""A run that starts from given weights (fine-tuning): a run directory whose only checkpoint is of step 0.

It is a training checkpoint like any other, but for Adam's moments, which it does not have: they start at zero. A moving
average starts from the weights, and a discriminator as in a new run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gigatok_ds.checkpoint.class_names import CLASSES_FILE, classes_bytes
from gigatok_ds.checkpoint.fragments import WEIGHTS, Fragment, SavedLayout, Snapshot
from gigatok_ds.checkpoint.original import build_on_meta, written_specs
from gigatok_ds.checkpoint.run_directory import MODEL_PARTS, RECIPE_FILE, STATE_FILE, State, checkpoint_path
from gigatok_ds.checkpoint.tensor_files import LazyTensors, groups_of, shapes_of
from gigatok_ds.config.load import save_resolved
from gigatok_ds.config.losses import AdversarialConfig
from gigatok_ds.config.model import GPTConfig, TokenizerConfig
from gigatok_ds.config.recipe import Recipe, TokenizerRecipe
from gigatok_ds.errors import InputError
from gigatok_ds.files import directory_beside, naming_failures, sha256, write_atomically
from gigatok_ds.models.initialisation import initial_fills
from gigatok_ds.models.positions import resizable, resize
from gigatok_ds.parallel.sharding import declared_shards
from gigatok_ds.streams import stream_key, torch_stream

logger = logging.getLogger(__name__)

# Weights are written in as many files as there would be data ranks with this much of them each.
FILE_BYTES = 512 * 1024**2
CLASS_TABLE = "cls_embedding.embedding_table.weight"  # a GPT's parameter, a row for each class


def write_start_point(recipe: Recipe, weights: Mapping[str, Tensor], out: Path, *, fresh: Sequence[str] = (),
                      classes: Sequence[str] = ()) -> Path:
    """Write the run directory `out`, for `gigatok-ds train out/recipe.yaml --out out`, and return it; whole or not at
    all.

    weights are a state_dict of the recipe's model, of which few tensors are in memory at a time. Parameters whose names
    start with one of `fresh` get their initial values instead. classes are the names of the classes that the weights
    know; the run's data will be numbered by them, unless the embedding of classes is `fresh`. Tables of positions of
    another size are resized (models.positions), which is logged. Raises InputError when `out` exists, or another
    parameter is missing or of another shape.
    """
    if out.exists():
        raise InputError(f"{out} exists already; choose another directory for the run")
    network = build_on_meta(recipe.model)
    started = _started(network, _at_size(recipe.model, network, weights, fresh), fresh, recipe.training.seed)
    parts: dict[str, tuple[nn.Module, Mapping[str, Tensor]]] = {MODEL_PARTS[recipe.kind]: (network, started)}
    if isinstance(recipe, TokenizerRecipe) and recipe.loss.adversarial:
        discriminator = _discriminator(recipe, recipe.loss.adversarial)
        parts["discriminator"] = (discriminator, discriminator.state_dict())
    out.parent.mkdir(parents=True, exist_ok=True)
    with naming_failures(out), directory_beside(out) as scratch:
        checkpoint = checkpoint_path(scratch, 0)
        files = {f"{part}/{name}": digest for part, (of, values) in parts.items()
                 for name, digest in _write_network(checkpoint / part, of, values)}
        if classes and not CLASS_TABLE.startswith(tuple(fresh)):
            for folder in (scratch, checkpoint):
                write_atomically(folder / CLASSES_FILE, classes_bytes(classes))
            files[CLASSES_FILE] = sha256(checkpoint / CLASSES_FILE)
        state = State(step=0, samples=0, parts=sorted(parts), world_size=1, tensor_size=1, stage=0, metrics={},
                      guard={}, files=files)
        save_resolved(recipe, scratch / RECIPE_FILE)
        write_atomically(checkpoint / STATE_FILE, state.to_json().encode())
    return out


def _at_size(config: TokenizerConfig | GPTConfig, network: nn.Module, weights: Mapping[str, Tensor],
             fresh: Sequence[str]) -> Mapping[str, Tensor]:
    """The weights with tables of positions of the network's size."""
    wanted, shapes = {name: spec[1] for name, spec in written_specs(network).items()}, shapes_of(weights)
    keep = 1 if isinstance(config, GPTConfig) else 0
    resized = {}
    for name, how in resizable(config).items():
        if name not in shapes or name not in wanted or name.startswith(tuple(fresh)):
            continue
        if shapes[name] != wanted[name] and shapes[name][1:] == wanted[name][1:]:
            found = resize(weights[name], wanted[name][0], how, keep=keep)
            if found is not None:
                logger.info("%s: %s", name, found.how)
                resized[name] = found.table
    if not resized:
        return weights
    return LazyTensors(shapes | {name: table.shape for name, table in resized.items()},
                       lambda name: resized[name] if name in resized else weights[name])


def _started(network: nn.Module, weights: Mapping[str, Tensor], fresh: Sequence[str], seed: int) -> LazyTensors:
    """The weights to start from, checked by shape; those that begin anew are drawn as for a new run."""
    expected, shapes = written_specs(network), shapes_of(weights)
    fills = {name: fill for name, _, fill in initial_fills(network) if name.startswith(tuple(fresh))}
    for prefix in fresh:
        if not any(name.startswith(prefix) for name in fills):
            raise InputError(f"--fresh {prefix} names no parameter of this recipe's model; names look like "
                             f"{next(iter(expected))}")
    for name, (_, shape) in expected.items():
        remedy = f"start that anew with --fresh {name.rpartition('.')[0] or name}"
        if name not in fills and name not in shapes:
            raise InputError(f"the weights to start from lack {name}; choose the recipe of their model, or {remedy}")
        if name not in fills and shapes[name] != shape:
            raise InputError(f"{name} is {list(shapes[name])} in the weights to start from and {list(shape)} in this "
                             f"recipe; change the recipe, or {remedy}")

    def read(name: str) -> Tensor:
        dtype, shape = expected[name]
        if name not in fills:
            return weights[name].to(dtype)
        value = torch.empty(shape)
        fills[name](value, torch_stream(seed, "weights", name))
        return value

    return LazyTensors({name: spec.shape for name, spec in expected.items()}, read)


def _discriminator(recipe: TokenizerRecipe, config: AdversarialConfig) -> nn.Module:
    from gigatok_ds.losses.composition import build_discriminator

    torch.manual_seed(stream_key(recipe.training.seed, "weights", "discriminator"))
    return build_discriminator(config, image_size=recipe.model.image_size)


def _write_network(folder: Path, network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Write a network as if each of several data ranks had held some of its parameters; yields names and SHA-256."""
    trained = {name: list(parameter.shape) for name, parameter in network.named_parameters() if parameter.requires_grad}
    shares = groups_of({name: 4 * math.prod(shape) for name, shape in trained.items()}, FILE_BYTES)
    layout = SavedLayout(tensor_size=1, data_size=len(shares), parameters=trained,
                    cuts={name: cut for name, cut in declared_shards(network).items() if name in trained},
                    kinds=[WEIGHTS], adam_steps=dict.fromkeys(trained, 0), counters={})
    for rank, names in enumerate(shares):
        values = {name: Fragment(0, weights[name].detach().float().flatten().contiguous()) for name in names}
        full = {name: weights[name].contiguous() for name in weights if name not in trained} if rank == 0 else {}
        yield from Snapshot(tensor_rank=0, data_rank=rank, layout=layout, fragments={WEIGHTS: values},
                            full=full).write(folder).items()
