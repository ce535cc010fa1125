"""From a training run to a standalone checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gigatok_ds.checkpoint.fragments import EMA, WEIGHTS, SavedEngine
from gigatok_ds.checkpoint.original import build_on_meta
from gigatok_ds.checkpoint.run_directory import newest_checkpoint
from gigatok_ds.checkpoint.standalone import save_standalone
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.recipe import TokenizerRecipe
from gigatok_ds.errors import InputError
from gigatok_ds.training.run import RECIPE_FILE


def export_run(run_dir: Path, out: Path, *, choice: Literal["ema", "model"] | None = None, overwrite: bool = False) -> Path:
    """Write the newest complete checkpoint of a run as a standalone checkpoint (float32) and return its path.

    choice is which weights to write: by default the moving average where the run kept one. Raises InputError when the run
    has no checkpoint, one that does not fit its recipe, or no average and one is asked for.
    """
    recipe_file = run_dir / RECIPE_FILE
    if not recipe_file.is_file():
        raise InputError(f"{run_dir} is not a training run: it has no {RECIPE_FILE}")
    recipe = load_recipe(str(recipe_file))
    checkpoint = newest_checkpoint(run_dir)
    part = "generator" if isinstance(recipe, TokenizerRecipe) else "gpt"
    network = build_on_meta(recipe.model)
    saved = SavedEngine(checkpoint / part)
    choice = choice or ("ema" if saved.has(EMA) else "model")
    if choice == "ema" and not saved.has(EMA):
        raise InputError(f"{checkpoint} holds no averaged weights: the run had training.ema_decay=null")
    weights = saved.tensors(EMA if choice == "ema" else WEIGHTS)
    expected = network.state_dict()
    for name, tensor in expected.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise InputError(f"{checkpoint} does not hold {name} of shape {tuple(tensor.shape)} as recipe.yaml says")
    weights = {name: weights[name].to(tensor.dtype) for name, tensor in expected.items()}
    provenance = {"recipe": recipe.name, "checkpoint": checkpoint.name, "weights": choice}
    return save_standalone(out, recipe.model, weights, provenance=provenance, overwrite=overwrite)
