"""Rehearsals of deep networks in a fraction of the time: transformer layers are alike, so a few are run and the rest
follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from gigatok_ds.config.recipe import GPTRecipe, Recipe
from gigatok_ds.dry_run.dry_run import Rehearsal
from gigatok_ds.dry_run.dry_run_result import MicroBatch
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tokenizer import Tokenizer


class _OneLayer:
    """What a layer adds to a rehearsal: the bytes that it keeps for the backward pass, and what is computed, started
    and sent forward and backward. Read where the last two layers of a transformer begin, and where their backward
    passes end."""

    def __init__(self, layers: Iterable[nn.Module], rehearsal: Rehearsal):
        self.so_far = rehearsal.so_far
        self.forward: list[MicroBatch] = []
        self.backward: dict[int, MicroBatch] = {}
        for number, layer in enumerate(list(layers)[-2:]):
            layer.register_forward_pre_hook(partial(self._begin, number))

    def _begin(self, number: int, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.forward.append(self.so_far())
        inputs[0].register_hook(lambda gradient: self.backward.setdefault(number, self.so_far()) and None)

    def added(self) -> MicroBatch:
        forward = self.forward[1].plus(self.forward[0], -1)
        backward = self.backward[0].plus(self.backward[1], -1)
        return forward.plus(backward)._replace(kept=forward.kept)


def rehearse(recipe: Recipe, samples: int, step: int, *, compiled: bool = False) -> MicroBatch:
    """What `Rehearsal(recipe, compiled=compiled).micro_batch(samples, step)` gives.

    The most that is alive is so while all layers keep their bytes, whatever else is alive at that moment.
    """
    depths = depths_of(recipe)
    fewest = {side: min(layers, _fewest(recipe, side)) for side, layers in depths.items()}
    # Neighbouring layers are not alike, or have no backward pass to be read at.
    if fewest == depths or recipe.parallel.recompute_every > 1 or recipe.training.freeze:
        return Rehearsal(recipe, compiled=compiled).micro_batch(samples, step)
    rehearsal = Rehearsal(with_depths(recipe, fewest), compiled=compiled)
    layers = {side: _OneLayer(of_side, rehearsal) for side, of_side in _layers(rehearsal).items()}
    total = rehearsal.run(samples, step)
    for side, layer in layers.items():
        total = total.plus(layer.added(), depths[side] - fewest[side])
    return rehearsal.as_compiled(total, samples)


def _layers(rehearsal: Rehearsal) -> dict[str, Iterable[nn.Module]]:
    trained = rehearsal.trained["gpt" if "gpt" in rehearsal.trained else "generator"]
    if isinstance(trained, GPT):
        return {"size": trained.layers}
    assert isinstance(trained, Tokenizer)
    return {"encoder": trained.encoder.transformer, "decoder": trained.decoder.transformer}


def depths_of(recipe: Recipe) -> dict[str, int]:
    """Layers of each transformer, by the setting of the model that says so."""
    if isinstance(recipe, GPTRecipe):
        return {"size": recipe.model.transformer.layers}
    return {"encoder": recipe.model.encoder_size.layers, "decoder": recipe.model.decoder_size.layers}


def with_depths(recipe: Recipe, depths: Mapping[str, int]) -> Recipe:
    """The recipe with so many layers."""
    if isinstance(recipe, GPTRecipe):
        size = replace(recipe.model.transformer, layers=depths["size"])
        return replace(recipe, model=replace(recipe.model, size=size))
    encoder, decoder = recipe.model.encoder_size, recipe.model.decoder_size
    return replace(recipe, model=replace(recipe.model, encoder=replace(encoder, layers=depths["encoder"]),
                                         decoder=replace(decoder, layers=depths["decoder"])))


def _fewest(recipe: Recipe, side: str) -> int:
    """The layer before the last is read. The first one may differ, and a semantic head needs its layer."""
    head = getattr(recipe.model, "semantic_head", None)
    return max(3, head.depth) if side == "decoder" and head else 3
