"""A demo's directory: what lies where, and how it was asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.recipe import Recipe, TokenizerRecipe
from gigatok_ds.demo.source import DemoSource


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """How the demo runs: `ranks` processes, of which `tensor` share each layer, ZeRO `stage`, and recipe overrides."""

    ranks: int = 1
    tensor: int = 1
    stage: int = 1
    tokenizer: tuple[str, ...] = ()
    gpt: tuple[str, ...] = ()


class Workspace:
    """Where things are in a demo's directory `out`, and the recipes of its two models."""

    def __init__(self, source: DemoSource, out: Path, options: DemoOptions):
        self.source, self.out, self.options = source, out, options
        self.shards = {"train": out / "data" / "train", "validation": out / "data" / "test"}
        self.codes = {"train": out / "codes" / "train", "validation": out / "codes" / "test"}
        self.exports = {"tokenizer": out / "export" / "tokenizer", "gpt": out / "export" / "gpt"}
        # Recipes are checked before the first phase: a typo must not surface after minutes of training.
        self.recipes = {kind: self._recipe(kind) for kind in ("tokenizer", "gpt")}

    def _recipe(self, kind: str) -> Recipe:
        return load_recipe(f"demo_{kind}", self._overrides(kind))

    @property
    def tokenizer_recipe(self) -> TokenizerRecipe:
        recipe = self.recipes["tokenizer"]
        assert isinstance(recipe, TokenizerRecipe)
        return recipe

    def _overrides(self, kind: str) -> list[str]:
        paths = self.shards if kind == "tokenizer" else self.codes
        own = [f"data.{split}={json.dumps(str(path))}" for split, path in paths.items()]
        own.append(f"parallel.tensor={self.options.tensor}")
        if kind == "tokenizer":
            return [*own, *self.options.tokenizer]
        tokenizer = load_recipe("demo_tokenizer", self.options.tokenizer)
        assert isinstance(tokenizer, TokenizerRecipe)
        shape = [f"model.num_classes={len(self.source.classes)}",
                 f"model.sequence_length={tokenizer.model.latent_tokens}",
                 f"model.vocab_size={tokenizer.model.quantizer.codebook_size}"]
        return [*own, *shape, *self.options.gpt]
