"""What a run tells about itself while it trains."""

from __future__ import annotations

from dataclasses import dataclass

from gigatok_ds.config.model import at_least, probability
from gigatok_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """`peak_tflops` is what a device could do at most, in 1e12 floating-point operations per second (null: from a table
    of GPUs); `mfu` and `hfu` are fractions of it. `wandb_project` also logs to that Weights & Biases project. A rank
    that is at one step, one validation or one checkpoint for more than `stall_seconds` ends the run (null: never)."""

    peak_tflops: float | None = None
    wandb_project: str | None = None
    stall_seconds: float | None = 3600.0

    def __post_init__(self) -> None:
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise InputError(f"monitor.peak_tflops is {self.peak_tflops}; it must be above 0, or null")
        if self.stall_seconds is not None and self.stall_seconds <= 0:
            raise InputError(f"monitor.stall_seconds is {self.stall_seconds}; it must be above 0, or null")
        if self.wandb_project == "":
            raise InputError("monitor.wandb_project is empty; give the name of a project, or null")


@dataclass(frozen=True, kw_only=True)
class TokenizerMonitorConfig(MonitorConfig):
    """A term whose gradient stays below a millionth of the largest other's for `dead_term_steps` steps in a row is
    warned about, and so is a codebook of which less than `collapse_usage` is in use (0: never). `preview_images`
    reconstructions are shown with every validation (0: none)."""

    dead_term_steps: int = 1000
    collapse_usage: float = 0.05
    preview_images: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, "monitor", dead_term_steps=self.dead_term_steps)
        at_least(0, "monitor", preview_images=self.preview_images)
        probability("monitor", collapse_usage=self.collapse_usage)
