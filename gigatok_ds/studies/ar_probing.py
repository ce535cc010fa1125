"""AR probing: how good a tokenizer is for generation, told by a small GPT trained on its codes (GigaTok, section 3)."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from gigatok_ds.checkpoint.standalone import CONFIG_FILE, described_config
from gigatok_ds.config.load import load_recipe
from gigatok_ds.data.codes import METADATA_FILE
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.results import RESULTS, Results, read_figures, write_results
from gigatok_ds.ownership import owned
from gigatok_ds.shards.remote import open_shards
from gigatok_ds.studies.guidance_search import search_guidance
from gigatok_ds.studies.reproduction import probe_stage
from gigatok_ds.studies.sampling_stages import GenerationSetup, Trial, generation_stages, remove_samples
from gigatok_ds.studies.stages import Launcher, Stage

# The original trains for 250,000 of 1,500,000 steps, before the learning rate begins to fall.
PROBING = ("training.steps=250000", "schedule.kind=const", "schedule.warmup_steps=0")
SEARCH_START = 2.0


@dataclass(frozen=True, kw_only=True)
class ARProbing:
    """`scale`: the guidance scale, None to search for it; `gpt`: overrides of the recipe; `probe`: further arguments of
    `gigatok-ds probe`; `crops`: views of a training image, as of `gigatok-ds extract-codes`."""

    tokenizer: Path
    train: str
    val: str
    reference: Path
    inception: str
    out: Path
    recipe: str = "GPT-B"
    gpt: tuple[str, ...] = ()
    zero: int = 1
    scale: float | None = None
    count: int = 50_000
    crops: str = "ten-crop"
    probe: tuple[str, ...] = ()
    device: str = "cpu"
    workers: int = 0
    batch_size: int = 32
    allow: tuple[str, ...] = ()
    orient: bool = False

    @property
    def standalone(self) -> Path:
        return self.out / "gpt-standalone"

    def overrides(self) -> list[str]:
        """The recipe's settings: AR probing's, what the tokenizer and the data ask for, then the user's."""
        config = described_config(self.tokenizer, "tokenizer")
        index = open_shards(self.train)
        shape = [f"model.vocab_size={config.quantizer.codebook_size}", f"model.sequence_length={config.latent_tokens}",
                 f"model.num_classes={index.count_classes()}"]
        data = [f"data.{split}={json.dumps(str(self.out / 'codes' / split))}" for split in ("train", "validation")]
        return [*PROBING, *shape, *data, *self.gpt]

    @property
    def _orient(self) -> list[str]:
        return ["--orient"] if self.orient else []

    def check(self) -> None:
        """Raises InputError for settings and data that would fail later."""
        open_shards(self.val).check_labelled(every=True)
        recipe = load_recipe(self.recipe, self.overrides())
        if recipe.kind != "gpt":
            raise InputError(f"--recipe is {self.recipe}, which is of a {recipe.kind}; AR probing trains a GPT")

    def training_stages(self) -> list[Stage]:
        """Codes, training, conversion."""
        stages = []
        for split, shards, crops in (("train", self.train, self.crops), ("validation", self.val, "center")):
            codes = self.out / "codes" / split
            arguments = ["extract-codes", self.tokenizer, shards, "--out", codes, "--crops", crops, "--device",
                         self.device, "--batch-size", self.batch_size, "--workers", self.workers,
                         *self._orient]
            stages.append(Stage(name=f"{split} codes", arguments=arguments, done=codes / METADATA_FILE))
        run = self.out / "gpt"
        train = ["train", self.recipe, "--out", run, "--zero", self.zero, *self.overrides()]
        convert = ["convert", run, self.standalone]
        done = self.standalone / CONFIG_FILE
        if done.exists():
            return stages
        return [*stages, Stage(name="GPT training", arguments=train, done=None),
                Stage(name="conversion", arguments=convert, done=done, alone=True)]

    def loss_stage(self) -> Stage:
        out = self.out / "loss"
        arguments = ["evaluate", "loss", self.standalone, self.out / "codes" / "validation", "--device", self.device,
                     "--out", out]
        return Stage(name="validation loss", arguments=arguments, done=out / RESULTS)

    def setup(self) -> GenerationSetup:
        return GenerationSetup(gpt=self.standalone, tokenizer=self.tokenizer, reference=self.reference,
                               inception=self.inception, count=self.count, batch_size=self.batch_size,
                               device=self.device, allow=self.allow)

    def run(self, launcher: Launcher) -> dict[str, float]:
        """Every stage that is not done; returns gFID and its companions, validation loss and probe accuracy."""
        self.check()
        with nullcontext() if launcher.dry_run else owned(self.out):
            return self._stages(launcher)

    def _stages(self, launcher: Launcher) -> dict[str, float]:
        probe = probe_stage(self.tokenizer, self.standalone, self.train, self.val, self.out / "probe", self.device,
                            self.workers, (*self._orient, *self.probe))
        launcher.run([*self.training_stages(), self.loss_stage(), probe])
        trial, generation = self._generation(launcher)
        if launcher.dry_run:
            return {}
        loss, accuracy = read_figures(self.out / "loss"), read_figures(self.out / "probe")
        assert loss is not None and accuracy is not None, "a stage ended without figures"
        figures = {**generation, **loss, **accuracy}
        settings = {"tokenizer": self.tokenizer.resolve().name, "recipe": self.recipe, "overrides": list(self.gpt),
                    "orient": self.orient,
                    "guidance": f"{trial.schedule} {trial.scale}" + (" (searched)" if self.scale is None else "")}
        write_results(self.out, Results(title=f"AR probing of {self.tokenizer.resolve().name}", figures=figures,
                                        settings=settings))
        return figures

    def _generation(self, launcher: Launcher) -> tuple[Trial, dict[str, float]]:
        if self.scale is None:
            start = Trial(schedule="constant", scale=SEARCH_START)
            if launcher.dry_run:
                launcher.run(generation_stages(self.setup(), start, self.out / "search" / start.name))
                return start, {}
            return search_guidance(self.setup(), self.out / "search", launcher, schedule="constant", start=SEARCH_START)
        trial, folder = Trial(schedule="constant", scale=self.scale), self.out / "generation"
        launcher.run(generation_stages(self.setup(), trial, folder))
        if not launcher.dry_run:
            remove_samples(folder)
        return trial, read_figures(folder) or {}
