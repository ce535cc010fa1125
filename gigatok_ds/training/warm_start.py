"""A run that starts from given weights (fine-tuning, a new phase): a run directory whose only checkpoint is of step 0.

It is a training checkpoint like any other. What it takes of a run's state beside the weights is named (`Kept`); of the
rest, moments start at zero, a moving average from the weights, and a discriminator as in a new run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gigatok_ds.checkpoint.class_names import CLASSES_FILE, classes_bytes
from gigatok_ds.checkpoint.fragments import EMA, MOMENTS, WEIGHTS, Fragment, SavedEngine, SavedLayout, Snapshot
from gigatok_ds.checkpoint.original import build_on_meta, written_specs
from gigatok_ds.checkpoint.run_directory import (
    MODEL_PARTS,
    RECIPE_FILE,
    STATE_FILE,
    State,
    checkpoint_path,
    damaged_file,
    read_state,
)
from gigatok_ds.checkpoint.tensor_files import LazyTensors, groups_of, shapes_of
from gigatok_ds.config.load import save_resolved
from gigatok_ds.config.losses import AdversarialConfig
from gigatok_ds.config.model import GPTConfig, TokenizerConfig
from gigatok_ds.config.recipe import Recipe, TokenizerRecipe, TrainingConfig
from gigatok_ds.engine.optimizers import hidden_matrices
from gigatok_ds.errors import InputError
from gigatok_ds.files import directory_beside, naming_failures, sha256, write_atomically
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.initialisation import initial_fills
from gigatok_ds.models.positions import resizable, resize
from gigatok_ds.models.tuning import adapt_, is_adapters
from gigatok_ds.parallel.sharding import declared_shards
from gigatok_ds.streams import stream_key, torch_stream

logger = logging.getLogger(__name__)

# Weights are written in as many files as there would be data ranks with this much of them each.
FILE_BYTES = 512 * 1024**2
CLASS_TABLE = "cls_embedding.embedding_table.weight"  # a GPT's parameter, a row for each class
USAGE = "quantizer.codebook_used"  # a tokenizer's buffer, its latest codes
KEEPS = ("usage", "ema", "moments", "discriminator")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a new phase takes of a run's `checkpoint` beside the weights: some of `KEEPS`."""

    parts: frozenset[str] = frozenset(["usage"])
    checkpoint: Path | None = None


class _State(NamedTuple):
    """What there is for the parameters of a network beside weights: float32, by kind and name; Adam's updates."""

    tensors: dict[str, Mapping[str, Tensor]]
    adam_steps: dict[str, int]


NO_STATE = _State({}, {})


def kept_of(asked: Sequence[str] | None, recipe: Recipe, checkpoint: Path | None) -> Kept:
    """What is meant by names of `KEEPS`, by "all" (as far as there are such things) or by None, which is usual.

    checkpoint: of a run, None of a model alone. Raises InputError for what the source does not have, and for what the
    recipe would not use.
    """
    if asked is None:
        return Kept(checkpoint=checkpoint)
    if unknown := [name for name in asked if name not in (*KEEPS, "all")]:
        raise InputError(f"--keep has {unknown[0]!r}; it takes {', '.join(KEEPS)} or all")
    reasons = {name: _cannot_keep(name, recipe, checkpoint) for name in KEEPS}
    if "all" in asked:
        return Kept(parts=frozenset(name for name, reason in reasons.items() if not reason), checkpoint=checkpoint)
    for name in asked:
        if reason := reasons[name]:
            raise InputError(f"--keep {name}: {reason}; leave it out")
    return Kept(parts=frozenset(asked), checkpoint=checkpoint)


def _cannot_keep(name: str, recipe: Recipe, checkpoint: Path | None) -> str | None:
    """Why a part cannot be kept, or None."""
    if name in ("usage", "discriminator") and not isinstance(recipe, TokenizerRecipe):
        return "a GPT has none"
    if name == "usage":
        return None
    if checkpoint is None:
        return "the source is a model alone, which has none; name a run or one of its checkpoints"
    if recipe.training.lora:
        return "adapters (training.lora) begin anew"
    if name == "discriminator":
        if not (isinstance(recipe, TokenizerRecipe) and recipe.loss.adversarial):
            return "loss.adversarial is null, so nothing would use it"
        return None if "discriminator" in read_state(checkpoint).parts else f"{checkpoint} has none"
    if name == "ema" and recipe.training.ema_decay is None:
        return "training.ema_decay is null, so nothing would use it"
    saved = SavedEngine(checkpoint / MODEL_PARTS[recipe.kind])
    if any(map(is_adapters, saved.layout.parameters)):
        return f"{checkpoint} has it of adapters (training.lora), which are merged into the weights"
    return None if saved.has(EMA if name == "ema" else MOMENTS[0]) else f"{checkpoint} has none"


def write_start_point(recipe: Recipe, weights: Mapping[str, Tensor], out: Path, *, fresh: Sequence[str] = (),
                      classes: Sequence[str] = (), kept: Kept = Kept()) -> Path:
    """Write the run directory `out`, for `gigatok-ds train out/recipe.yaml --out out`, and return it; whole or not at
    all.

    weights are a state_dict of the recipe's model, of which few tensors are in memory at a time. Parameters whose names
    start with one of `fresh` get their initial values instead, and so do adapters (`training.lora`). classes are the
    names of the classes that the weights know; the run's data will be numbered by them, unless the embedding of classes
    is `fresh`. Tables of positions of another size are resized (models.positions), which is logged. Raises InputError
    when `out` exists, when another parameter is missing or of another shape, when one that is `fresh` would never be
    trained, or when what is kept does not fit.
    """
    if out.exists():
        raise InputError(f"{out} exists already; choose another directory for the run")
    network = build_on_meta(recipe.model)
    if recipe.training.lora and isinstance(network, GPT):
        with torch.device("meta"):
            adapt_(network, recipe.training.lora)
    sized = _at_size(recipe.model, network, weights, fresh)
    started = _started(network, sized, fresh, recipe.training, usage="usage" in kept.parts)
    given, wanted = shapes_of(weights), shapes_of(started)
    changed = {name for name in wanted if name.startswith(tuple(fresh)) or given.get(name) != wanted[name]}
    part = MODEL_PARTS[recipe.kind]
    parts: dict[str, tuple[nn.Module, Mapping[str, Tensor], _State]] = {
        part: (network, started, _kept_state(recipe, part, network, started, kept, changed))}
    if isinstance(recipe, TokenizerRecipe) and recipe.loss.adversarial:
        discriminator = _discriminator(recipe, recipe.loss.adversarial)
        parts["discriminator"] = (discriminator, *_kept_discriminator(recipe, discriminator, kept))
    out.parent.mkdir(parents=True, exist_ok=True)
    with naming_failures(out), directory_beside(out) as scratch:
        checkpoint = checkpoint_path(scratch, 0)
        files = {f"{part}/{name}": digest for part, written in parts.items()
                 for name, digest in _write_network(checkpoint / part, *written)}
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


def _started(network: nn.Module, weights: Mapping[str, Tensor], fresh: Sequence[str], training: TrainingConfig, *,
             usage: bool) -> LazyTensors:
    """The weights to start from, checked by shape; those that begin anew are drawn as for a new run.

    usage: the latest codes are kept, too.
    """
    expected, shapes = written_specs(network), shapes_of(weights)
    fills = {name: fill for name, _, fill in initial_fills(network)
             if is_adapters(name) or name.startswith(tuple(fresh))}
    for prefix in fresh:
        found = [name for name in fills if name.startswith(prefix)]
        _refuse_untrained(prefix, found, training)
        if not found:
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
        if name == USAGE and not usage:
            return torch.zeros(shape, dtype=dtype)
        if name not in fills:
            return weights[name].to(dtype)
        value = torch.empty(shape)
        fills[name](value, torch_stream(training.seed, "weights", name))
        return value

    return LazyTensors({name: spec.shape for name, spec in expected.items()}, read)


def _refuse_untrained(prefix: str, names: Sequence[str], training: TrainingConfig) -> None:
    """InputError when a parameter that is to begin anew would stay at its random values beside adapters."""
    for name in names:
        part = name.partition(".")[0]
        if training.lora and part not in training.lora.train and not is_adapters(name):
            remedy = "leave --fresh out" if part == "layers" else f"add {part} to training.lora.train"
            raise InputError(f"--fresh {prefix} draws {name} anew, which training.lora would leave at that; {remedy}")


def _discriminator(recipe: TokenizerRecipe, config: AdversarialConfig) -> nn.Module:
    from gigatok_ds.losses.composition import build_discriminator

    torch.manual_seed(stream_key(recipe.training.seed, "weights", "discriminator"))
    return build_discriminator(config, image_size=recipe.model.image_size)


def _without(name: str, kept: Kept) -> str:
    """How to keep the other parts alone."""
    others = ",".join(part for part in KEEPS if part in kept.parts and part != name)
    return f"keep the others alone (--keep {others})" if others else "leave --keep out"


def _kept_state(recipe: Recipe, part: str, network: nn.Module, weights: Mapping[str, Tensor], kept: Kept,
                changed: Container[str] = ()) -> _State:
    """What is kept for the parameters of a part that are to be trained; for those that have changed it cannot be."""
    if kept.checkpoint is None or not kept.parts & {"ema", "moments"}:
        return NO_STATE
    saved = SavedEngine(kept.checkpoint / part)
    shapes = {name: list(parameter.shape) for name, parameter in network.named_parameters() if parameter.requires_grad
              and not (part != "discriminator" and name.partition(".")[0] in recipe.training.freeze)}
    tensors: dict[str, Mapping[str, Tensor]] = {}
    if "moments" in kept.parts:
        one_moment = hidden_matrices(network, recipe.optimizer) if part != "discriminator" else ()
        for kind in MOMENTS:
            wanted = {name: shape for name, shape in shapes.items() if kind == MOMENTS[0] or name not in one_moment}
            for name in wanted:
                if name in changed or not saved.holds(kind, name):
                    why = "begins anew or at another size" if name in changed else (
                        f"was {'frozen' if kind == MOMENTS[0] else 'a matrix of Muon'} in {kept.checkpoint}")
                    raise InputError(f"--keep moments: {name} {why}, so there are none for it; "
                                     f"{_without('moments', kept)}")
            tensors[kind] = LazyTensors(wanted, partial(saved.read, kind))
    if "ema" in kept.parts and part != "discriminator":
        average = {name for name in shapes if name not in changed and saved.holds(EMA, name)}
        tensors[EMA] = LazyTensors(shapes, lambda name: saved.read(EMA, name) if name in average else weights[name])
    return _State(tensors, saved.layout.adam_steps if "moments" in kept.parts else {})


def _kept_discriminator(recipe: Recipe, discriminator: nn.Module, kept: Kept) -> tuple[Mapping[str, Tensor], _State]:
    """The discriminator's weights and state: the checkpoint's or, unless it is kept, those of a new run."""
    if kept.checkpoint is None or "discriminator" not in kept.parts:
        return discriminator.state_dict(), NO_STATE
    if problem := damaged_file(kept.checkpoint, read_state(kept.checkpoint), "discriminator"):
        raise InputError(f"{problem}; restore it from a copy, or take another checkpoint (--step)")
    saved = SavedEngine(kept.checkpoint / "discriminator")
    theirs, ours = ({name: list(shape) for name, shape in shapes.items()}
                    for shapes in (saved.shapes(), shapes_of(discriminator.state_dict())))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise InputError(f"--keep discriminator: {kept.checkpoint} has another one, whose {name} is "
                             f"{theirs.get(name, 'missing')} and not {ours.get(name, 'missing')}; "
                             f"{_without('discriminator', kept)}")
    return saved.tensors(), _kept_state(recipe, "discriminator", discriminator, {}, kept)


def _write_network(folder: Path, network: nn.Module, weights: Mapping[str, Tensor],
                   state: _State) -> Iterator[tuple[str, str]]:
    """Write a network as if each of several data ranks had held some of its parameters; yields names and SHA-256."""
    trained = {name: list(parameter.shape) for name, parameter in network.named_parameters() if parameter.requires_grad}
    kinds: dict[str, Mapping[str, Tensor]] = {WEIGHTS: weights, **state.tensors}
    shares = groups_of({name: 4 * math.prod(shape) for name, shape in trained.items()}, FILE_BYTES // len(kinds))
    layout = SavedLayout(tensor_size=1, data_size=len(shares), parameters=trained,
                    cuts={name: cut for name, cut in declared_shards(network).items() if name in trained},
                    kinds=list(kinds), adam_steps={name: state.adam_steps.get(name, 0) for name in trained},
                    counters={})
    for rank, names in enumerate(shares):
        values = {kind: {name: Fragment(0, tensors[name].detach().float().flatten().contiguous())
                         for name in names if name in tensors} for kind, tensors in kinds.items()}
        full = {name: weights[name].contiguous() for name in weights if name not in trained} if rank == 0 else {}
        yield from Snapshot(tensor_rank=0, data_rank=rank, layout=layout, fragments=values,
                            full=full).write(folder).items()
