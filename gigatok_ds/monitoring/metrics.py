"""What a run tells while it trains: metrics.jsonl, TensorBoard events and a progress bar."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import numpy as np

from gigatok_ds.errors import InputError
from gigatok_ds.files import naming_failures, write_atomically
from gigatok_ds.monitoring.history import LATEST
from gigatok_ds.monitoring.wandb_log import WandbRun, as_wandb_image
from gigatok_ds.untrusted import is_number

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
LARGEST_STEP = 2**53
NOT_FINITE = "not_finite_latents"  # of a micro batch, on average; the tokenizer counts them
EVENTS_DIRECTORY = "events"
_REFRESH_SECONDS = {True: 0.1, False: 30.0}  # of the bar, on a terminal and in a log file


class Monitor:
    """Logs one run, as a context manager; with `enabled` false it does nothing and touches nothing.

    Entering continues a run after `start_step`: what was logged for later steps is dropped, and so is a last
    line that a killed run left half-written. `wandb` opens a run of Weights & Biases, which is shown the same. Raises
    InputError when metrics.jsonl is damaged elsewhere.
    """

    def __init__(self, run_dir: str | Path, *, enabled: bool, total_steps: int, start_step: int = 0,
                 description: str, wandb: AbstractContextManager[WandbRun] | None = None):
        self.run_dir, self.enabled = Path(run_dir), enabled
        self.total_steps, self.start_step, self.description = total_steps, start_step, description
        self._wandb = wandb
        self._resources = ExitStack()

    def __enter__(self) -> Monitor:
        if not self.enabled:
            return self
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        metrics = self.run_dir / METRICS_FILE
        refresh = _REFRESH_SECONDS[sys.stderr.isatty()]
        with naming_failures(metrics), ExitStack() as stack:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            _truncate(metrics, self.start_step)
            stack.enter_context(_reported_by_us())
            self._metrics = stack.enter_context(open(metrics, "a", encoding="utf-8"))
            self._events = stack.enter_context(
                SummaryWriter(str(self.run_dir / EVENTS_DIRECTORY), purge_step=self.start_step + 1))
            self._bar = stack.enter_context(
                tqdm(total=self.total_steps, initial=self.start_step, desc=self.description, unit="step",
                     file=sys.stderr, dynamic_ncols=True, mininterval=refresh,
                     maxinterval=max(refresh, 10.0)))
            self._wandb_run = stack.enter_context(self._wandb) if self._wandb else None
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        with naming_failures(self.run_dir / EVENTS_DIRECTORY):
            self._resources.__exit__(*error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line, {"step", "time" (Unix seconds), the values}, and the same scalars to TensorBoard.

        A value that is not finite becomes null in the line, since JSON has no name for it.
        """
        if not self.enabled:
            return
        assert not {"step", "time"} & values.keys(), "these two names are ours"
        numbers = {name: float(value) for name, value in values.items()}
        line: dict[str, float | None] = {"step": step, "time": round(time.time(), 3)}
        line |= {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        self._write(line)
        with naming_failures(self.run_dir / EVENTS_DIRECTORY):
            for name, number in numbers.items():
                self._events.add_scalar(name, number, step)
            self._events.flush()
        if self._wandb_run:
            self._wandb_run.log({"step": step, **numbers})

    def warn(self, step: int, text: str) -> None:
        """Print a warning above the bar, and append the line {"step", "time", "warning"}; also to TensorBoard."""
        if not self.enabled:
            return
        logger.warning("step %d: %s", step, text)
        self._write({"step": step, "time": round(time.time(), 3), "warning": text})
        with naming_failures(self.run_dir / EVENTS_DIRECTORY):
            self._events.add_text("warning", text, step)
            self._events.flush()
        if self._wandb_run:
            self._wandb_run.log({"step": step, "warning": text})

    def _write(self, line: dict) -> None:
        with naming_failures(self.run_dir / METRICS_FILE):
            self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
            self._metrics.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Show an image, uint8 (H, W, 3), in TensorBoard (and Weights & Biases)."""
        if not self.enabled:
            return
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, (image.dtype, image.shape)
        with naming_failures(self.run_dir / EVENTS_DIRECTORY):
            self._events.add_image(name, image, step, dataformats="HWC")
            self._events.flush()
        if self._wandb_run:
            self._wandb_run.log({"step": step, name: as_wandb_image(image)})

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self.enabled:
            logger.info("%s", text)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Move the bar to `step` and show `values` next to the remaining time."""
        if not self.enabled:
            return
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        self._bar.update(step - self._bar.n)


@contextmanager
def _reported_by_us() -> Iterator[None]:
    """Within, a thread of TensorBoard's that cannot write prints no traceback: what it raised, the next flush raises
    again.
    """
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, oldest first; a value that was not finite is NaN, a warning is text.

    Calls of `Monitor.log` for one step are lines of their own. A last line still being written is left out.
    Raises FileNotFoundError when the run has logged nothing, InputError when the file is damaged.
    """
    records = [record for _, record in _parse(Path(run_dir) / METRICS_FILE)]
    return [{name: math.nan if value is None else value for name, value in record.items()}
            for record in records]


def of_the_machine(name: str) -> bool:
    """Whether a logged figure of this name depends on the machine, not only on the run."""
    return name in ("time", "mfu", "hfu") or name.startswith(("memory/", "throughput/"))


def _parse(path: Path) -> list[tuple[str, dict]]:
    """Complete lines as (text, record)."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    parsed = []
    for number, text in enumerate(lines, 1):
        record = _record(text)
        if record is not None:
            parsed.append((text, record))
        elif number < len(lines):
            raise InputError(f"line {number} of {path} is damaged; repair or remove it")
    return parsed


def _record(text: str) -> dict | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    full = is_number(record["step"], 0, LARGEST_STEP) and is_number(record.get("time"), 0, LATEST)
    figures = all(value is None or is_number(value) or (name == "warning" and isinstance(value, str))
                  for name, value in record.items())
    return record if full and figures else None


def _truncate(path: Path, last_step: int) -> None:
    """Keep only complete lines of steps up to `last_step`."""
    if not path.exists():
        return
    kept = "".join(f"{text}\n" for text, record in _parse(path) if record["step"] <= last_step)
    write_atomically(path, kept.encode())
