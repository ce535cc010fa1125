"""Writing checkpoints: aside, with checksums, complete at the moment of a rename; in the background if wished.

A thread of every rank writes that rank's files into `step-N.partial` and then, as `rank-R.json`, their checksums. When
those of all ranks are there, another thread of the first rank makes `state.json` of them and renames the directory.
That needs no communication other than the shared directory, so it can go on while training computes.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gigatok_ds.checkpoint.fragments import Snapshot
from gigatok_ds.checkpoint.retention import discard, prune
from gigatok_ds.checkpoint.run_directory import (
    LATEST_FILE,
    STATE_FILE,
    Saveable,
    State,
    checkpoint_path,
    partial_path,
)
from gigatok_ds.config.checkpoint import CheckpointConfig
from gigatok_ds.errors import InputError
from gigatok_ds.files import sync, synced_sha256, write_atomically, write_failure
from gigatok_ds.parallel.topology import Topology

POLL_SECONDS = 0.05
# When training ends by an exception, how long the first rank waits for what other ranks may still be writing.
LAST_WAIT_SECONDS = 30.0


class CheckpointWriter:
    """Saves the parts of a run. As a context, it ends with what was being written in the background."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, topology: Topology, *, stage: int,
                 attachments: tuple[str, ...] = ()):
        """attachments: files of the run directory to copy into each checkpoint, where there are such."""
        self._run_dir, self._config, self._topology, self._stage = run_dir, config, topology, stage
        self._attachments = attachments
        self._own: _Background | None = None
        self._all: _Background | None = None
        self._abandoned = threading.Event()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self._own:
            self._own.thread.join()
            if self._all and not self._own.error:
                self._all.thread.join(LAST_WAIT_SECONDS)
            self._abandon()

    def save(self, step: int, samples: int, parts: Mapping[str, Saveable], metrics: Mapping[str, float],
             guard: Mapping[str, Any] | None = None) -> None:
        """Save every part. Collective. When asynchronous, returns after copying, once an earlier save is finished.

        A failure leaves earlier checkpoints as they were, and is raised here or by a later call: InputError when the
        disk is full or cannot be written to.
        """
        self.finish()
        snapshots = {name: part.snapshot() for name, part in parts.items()}
        state = State(step=step, samples=samples, parts=sorted(parts), world_size=self._topology.world_size,
                      tensor_size=self._topology.tensor_size, stage=self._stage, metrics=dict(metrics),
                      guard=dict(guard or {}), files={})
        partial = partial_path(checkpoint_path(self._run_dir, step))
        self._own = _Background(lambda: self._write(partial, snapshots), lambda error: self._explained(error, step))
        if self._topology.is_first:
            self._all = _Background(lambda: self._complete(partial, state), lambda error: self._explained(error, step))
        if not self._config.asynchronous:
            self.finish()

    def check(self) -> None:
        """Raise what went wrong on this rank in the background, if anything did."""
        for background in filter(None, (self._own, self._all)):
            if background.error is not None:
                raise background.error

    def finish(self) -> None:
        """Wait until the last save is complete everywhere. Collective. Raises what went wrong on any rank."""
        if self._own is None:
            return
        self._own.thread.join()
        own, self._own = self._own.error, None
        failures = self._topology.gather_objects(own and str(own))
        if any(failures):
            self._abandon()
            raise own or InputError(next(filter(None, failures)))
        completed = None
        if self._all:
            self._all.thread.join()
            completed, self._all = self._all.error, None
        failure = self._topology.from_first(completed and str(completed))
        if failure:
            raise completed or InputError(failure)

    def _abandon(self) -> None:
        """Give up what other ranks did not finish writing."""
        self._abandoned.set()
        if self._all:
            self._all.thread.join()
            self._all = None

    def _write(self, partial: Path, snapshots: dict[str, Snapshot]) -> None:
        partial.mkdir(parents=True, exist_ok=True)
        files = {f"{part}/{name}": digest for part, snapshot in snapshots.items()
                 for name, digest in snapshot.write(partial / part).items()}
        if self._topology.is_first:
            for name in self._attachments:
                if (self._run_dir / name).is_file():
                    shutil.copyfile(self._run_dir / name, partial / name)
                    files[name] = synced_sha256(partial / name)
        write_atomically(_marker(partial, self._topology.rank), json.dumps(files).encode())

    def _complete(self, partial: Path, state: State) -> None:
        try:
            files = self._files_of_all(partial)
            if files is None:
                shutil.rmtree(partial, ignore_errors=True)
                return
            complete = State(**{**vars(state), "files": files})
            write_atomically(partial / STATE_FILE, complete.to_json().encode())
            for folder in [partial, *(partial / part for part in state.parts)]:
                sync(folder)
            final = checkpoint_path(self._run_dir, state.step)
            if final.exists():
                discard(final)
            os.rename(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(final.parent)
        write_atomically(final.parent / LATEST_FILE, f"{final.name}\n".encode())
        prune(self._run_dir, self._config)

    def _files_of_all(self, partial: Path) -> dict[str, str] | None:
        """Every rank's files and their checksums, once all are written; None when that was given up."""
        markers = [_marker(partial, rank) for rank in range(self._topology.world_size)]
        while not all(marker.is_file() for marker in markers):
            if self._abandoned.wait(POLL_SECONDS):
                return None
        files: dict[str, str] = {}
        for marker in markers:
            files |= json.loads(marker.read_text("utf-8"))
            marker.unlink()
        return files

    def _explained(self, error: BaseException, step: int) -> BaseException:
        reason = write_failure(error)
        if reason is None:
            return error
        failed = InputError(f"the checkpoint of step {step} could not be written below {self._run_dir} ({reason}); "
                          "earlier checkpoints are untouched: make room and run the same command again")
        failed.__cause__ = error
        return failed


class _Background:
    """A thread that does one thing; `error` is what it ended with, if it failed."""

    def __init__(self, work: Callable[[], None], explained: Callable[[BaseException], BaseException]):
        self.error: BaseException | None = None
        self._work, self._explained = work, explained
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = self._explained(error)


def _marker(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank:05d}.json"
