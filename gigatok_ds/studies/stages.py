"""Commands of ours run one after the other, each by all ranks of this host, and skipped where their result is there."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gigatok_ds.cluster.local_job import rank_environment
from gigatok_ds.errors import InputError

logger = logging.getLogger(__name__)

STDERR = 2  # stages tell their progress; what we print is the result


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`gigatok-ds ARGUMENTS`; `done` exists once it has ended well; None: the command knows itself, and is always run.

    `alone`: by one process.
    """

    name: str
    arguments: Sequence[object]
    done: Path | None
    alone: bool = False


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Starts stages in `ranks` processes of this host. With `dry_run` commands are printed and nothing starts."""

    ranks: int = 1
    dry_run: bool = False

    def __post_init__(self):
        if self.ranks < 1:
            raise InputError(f"--ranks is {self.ranks}; it must be at least 1")

    def command(self, stage: Stage) -> list[str]:
        prefix = [sys.executable]
        if self.ranks > 1 and not stage.alone:
            prefix += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        return [*prefix, "-m", "gigatok_ds", *map(str, stage.arguments)]

    def run(self, stages: Sequence[Stage]) -> None:
        """Raises InputError for a stage that fails; what it printed says why, and the next try goes on there."""
        for stage in stages:
            if self.dry_run:
                print(f"# {stage.name}{': done' if _ended(stage) else ''}")
                print(" ".join(self.command(stage)))
                continue
            if _ended(stage):
                logger.info("== %s: done", stage.name)
                continue
            logger.info("== %s", stage.name)
            finished = subprocess.run(self.command(stage), env=rank_environment(self.ranks), stdout=STDERR, check=False)
            if finished.returncode:
                raise InputError(f"{stage.name} failed (exit code {finished.returncode}); its own message is above; "
                                 "running the same command again goes on there")
            if stage.done and not stage.done.exists():
                raise InputError(f"{stage.name} ended, but {stage.done} is not there")


def _ended(stage: Stage) -> bool:
    return stage.done is not None and stage.done.exists()
