"""The whole system in one run: images, shards, tokenizer, codes, GPT, samples, figures, standalone exports.

Every phase leaves its result in the run directory and is skipped when the result is there, so running the same
command again continues where it stopped.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time

from gigatok_ds.checkpoint.conversion import convert
from gigatok_ds.checkpoint.model_sources import open_model
from gigatok_ds.checkpoint.standalone import identify, load_tokenizer
from gigatok_ds.cluster.local_job import free_port, rank_environment
from gigatok_ds.config.load import recipe_to_dict
from gigatok_ds.data.codes import METADATA_FILE
from gigatok_ds.demo.demo_evaluation import evaluate
from gigatok_ds.demo.demo_report import Figure
from gigatok_ds.demo.summary import summarise
from gigatok_ds.demo.workspace import Workspace
from gigatok_ds.errors import InputError
from gigatok_ds.ownership import is_unused, owned
from gigatok_ds.packing.shard_writer import write_shards
from gigatok_ds.sampling.augmented_views import views_of
from gigatok_ds.sampling.extract import Extraction, extract_codes

logger = logging.getLogger(__name__)

CODE_VIEWS = 8  # encoded crops per training image
CODE_BATCH = 512  # crops encoded at a time


class Demo(Workspace):
    """The phases in order. `out` becomes a self-contained run directory."""

    def run(self) -> list[Figure]:
        """Run what is not done yet and return the figures that the report states.

        Raises InputError when a phase fails or the exports differ from the trained models.
        """
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"{self.out} exists and is not a directory")
        with owned(self.out):
            return self._phases(time.monotonic())

    def _phases(self, started: float) -> list[Figure]:
        self._claim()
        self._write_shards()
        self._train("tokenizer")
        self._export("tokenizer")
        self._extract_codes()
        self._train("gpt")
        self._export("gpt")
        announce("evaluating the exports")
        values = evaluate(self)
        self._verify()
        return summarise(self, values, time.monotonic() - started)

    def _claim(self) -> None:
        """Make the directory ours; refuse one that belongs to something else or to another demo."""
        marker = self.out / "demo.json"
        description = {"source": self.source.name, "classes": self.source.classes,
                       "recipes": {kind: recipe_to_dict(recipe) for kind, recipe in self.recipes.items()}}
        if not is_unused(self.out) and not marker.is_file():
            raise InputError(f"{self.out} is not empty and is not a demo's directory; choose another --out")
        if marker.is_file():
            if json.loads(marker.read_text()) != json.loads(json.dumps(description)):
                raise InputError(f"{self.out} holds a demo with other data or settings; choose another --out")
            return
        scratch = marker.with_suffix(".partial")
        scratch.write_text(json.dumps(description, indent=2) + "\n")
        os.replace(scratch, marker)

    def _write_shards(self) -> None:
        for split, samples in (("train", self.source.train), ("validation", self.source.test)):
            if not self.shards[split].exists():
                announce(f"writing the {split} shards")
                write_shards(samples(), self.shards[split], prefix=self.source.name, classes=self.source.classes)

    def _train(self, kind: str) -> None:
        """Train in this process, or in `ranks` processes through DeepSpeed's launcher."""
        run_dir = self.out / kind
        announce(f"training the {kind} for {self.recipes[kind].training.steps} steps")
        command = ["train", f"demo_{kind}", "--out", str(run_dir), "--zero", str(self.options.stage),
                   *self._overrides(kind)]
        if self.options.ranks == 1:
            prefix = [sys.executable, "-m", "gigatok_ds"]
        else:
            prefix = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(self.options.ranks),
                      "--master_port", str(free_port()), "--no_local_rank", "--module", "gigatok_ds"]
        finished = subprocess.run([*prefix, *command], env=rank_environment(self.options.ranks), check=False)
        if finished.returncode:
            raise InputError(f"training the {kind} failed (exit code {finished.returncode}); its own message is above")

    def _export(self, kind: str) -> None:
        if not self.exports[kind].exists():
            announce(f"exporting the {kind}")
            convert(open_model(self.out / kind), self.exports[kind])

    def _extract_codes(self) -> None:
        recipe = self.tokenizer_recipe
        for split, crops in (("train", f"random-{CODE_VIEWS}"), ("validation", "center")):
            if not (self.codes[split] / METADATA_FILE).exists():
                announce(f"extracting the {split} codes")
                views = views_of(crops, recipe.model.image_size, crop_scale=recipe.data.crop_scale)
                tokenizer = self.exports["tokenizer"]
                extract_codes(load_tokenizer(tokenizer), self.shards[split], self.codes[split], views=views,
                              provenance={"tokenizer": identify(tokenizer)},
                              extraction=Extraction(batch_size=CODE_BATCH))

    def _verify(self) -> None:
        """Reload the exports in a fresh process that cannot import DeepSpeed or Megatron."""
        announce("checking the exports in a fresh process")
        finished = subprocess.run([sys.executable, "-m", "gigatok_ds.demo.verify", str(self.out)], check=False)
        if finished.returncode:
            raise InputError("the exported models do not reproduce the trained ones; the difference is printed above")


def announce(text: str) -> None:
    logger.info("== %s", text)
