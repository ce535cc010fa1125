"""Muon's matrices, found in a network without storage: engine/muon.py, engine/spread_matrices.py."""

from __future__ import annotations

from gigatok_ds.config.recipe import Recipe
from gigatok_ds.dry_run.dry_run import META, build_trained, layers_of
from gigatok_ds.dry_run.dry_run_result import MuonWork, PackedMatrix
from gigatok_ds.engine.optimizers import hidden_matrices
from gigatok_ds.parallel.sharding import declared_shards


def muon_work(recipe: Recipe) -> MuonWork:
    """Of the model of a recipe; its discriminator is AdamW's."""
    with META:
        network = next(iter(build_trained(recipe, layers_of(recipe)).values()))
    cuts, found = declared_shards(network), []
    for name in hidden_matrices(network, recipe.optimizer):
        shape, cut = network.get_parameter(name).shape, cuts.get(name)
        rows, columns = cut.packed_shape(shape, recipe.parallel.tensor) if cut else shape
        found.append(PackedMatrix(elements=shape.numel(), rows=rows, columns=columns, packed=cut.groups if cut else 1))
    return MuonWork(matrices=tuple(sorted(found, key=lambda matrix: -matrix.elements)))
