"""Samples drawn and judged: the two stages that searches, reproductions and AR probing share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gigatok_ds.evaluation.results import RESULTS
from gigatok_ds.studies.stages import Stage


@dataclass(frozen=True, kw_only=True)
class GenerationSetup:
    """Models, data and settings of an evaluation of samples; dtype is the GPT's."""

    gpt: Path
    tokenizer: Path
    reference: Path
    inception: str
    count: int = 50_000
    seed: int = 0
    dtype: str = "float32"
    batch_size: int = 32
    device: str = "cpu"
    allow: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting of guidance. window_end belongs to the rectangular schedule, window_start to it and to step."""

    schedule: str
    scale: float
    window_start: float | None = None
    window_end: float | None = None

    @property
    def annotation(self) -> str:
        """The schedule's arguments as the original writes them: `window_start=0.18`, empty for none."""
        windows = {"window_start": self.window_start, "window_end": self.window_end}
        return ";".join(f"{name}={value:.2f}" for name, value in windows.items() if value is not None)

    @property
    def name(self) -> str:
        return "-".join(filter(None, [self.schedule, self.annotation.replace("=", "").replace(";", "-"),
                                      f"cfg{self.scale:.2f}"]))

    def arguments(self) -> list[object]:
        found = ["--cfg", self.scale, "--cfg-schedule", self.schedule]
        found += [] if self.window_start is None else ["--cfg-start", self.window_start]
        return found + ([] if self.window_end is None else ["--cfg-end", self.window_end])


def generation_stages(setup: GenerationSetup, trial: Trial, folder: Path) -> list[Stage]:
    """Draw samples of random classes into `folder`/samples.npz and judge them; results end up in `folder`."""
    samples, results = folder / "samples.npz", folder / RESULTS
    sample = ["sample", "--gpt", setup.gpt, "--tokenizer", setup.tokenizer, "--count", setup.count, "--seed",
              setup.seed,
              *trial.arguments(), "--dtype", setup.dtype, "--batch-size", setup.batch_size, "--device", setup.device,
              "--out", samples]
    judge = ["evaluate", "generation", samples, "--reference", setup.reference, "--inception", setup.inception,
             "--device", setup.device, "--out", folder]
    judge += [word for allowed in setup.allow for word in ("--allow", allowed)]
    stages = [] if results.exists() else [Stage(name=f"sampling, {trial.name}", arguments=sample, done=samples)]
    return [*stages, Stage(name=f"evaluating, {trial.name}", arguments=judge, done=results)]


def remove_samples(folder: Path) -> None:
    """The images, 10 GB for 50,000; the results have what they were drawn with."""
    for name in ("samples.npz", "samples.npz.json"):
        (folder / name).unlink(missing_ok=True)
