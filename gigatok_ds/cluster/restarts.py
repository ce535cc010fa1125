"""A job that ends by a fault is started again, after waits that grow, as long as it makes progress."""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from gigatok_ds.signals import handled

logger = logging.getLogger(__name__)

# Done; an error that the user has to mend; interrupted; asked to stop (resilience.preemption).
FINAL = (0, 2, 130, 75)
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
FIRST_WAIT, LONGEST_WAIT = 5.0, 300.0  # seconds


def run_with_restarts(launch: Callable[[int], subprocess.Popen | None], most: int, progress: Callable[[], object], *,
                      sleep: Callable[[float], None] = time.sleep) -> int:
    """The exit code of the last try. There are at most `most` restarts in a row without progress.

    launch: starts the job, given how many restarts there have been; None when that is not possible now, which counts as
    a try. progress: something that changes when the job has got further, such as its newest checkpoint. Waits double
    from five seconds to five minutes, and begin anew after progress. A signal to this process goes to the job, and ends
    the tries.
    """
    asked: list[int] = []
    running: list[subprocess.Popen] = []

    def forward(number: int, _frame) -> None:
        asked.append(number)
        for process in running:
            process.send_signal(number)

    tries, wait, restarts = 0, FIRST_WAIT, 0
    with handled(forward, *FORWARDED):
        while True:
            reached = progress()
            running[:] = filter(None, [launch(restarts)])
            code = running[0].wait() if running else 1
            running.clear()
            if code in FINAL or asked:
                return _as_exit_code(code)
            if progress() != reached:
                tries, wait = 0, FIRST_WAIT
            if tries == most:
                logger.info("%d restarts in a row without a new checkpoint; giving up", most)
                return _as_exit_code(code)
            tries, restarts = tries + 1, restarts + 1
            logger.info("the job ended with exit code %d; restart %d of %d in %g s", code, tries, most, wait)
            sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
            if asked:
                return 128 + asked[0]


def newest_checkpoint(run_dir: Path) -> str | None:
    """The name of the newest complete checkpoint of a run."""
    latest = run_dir / "checkpoints" / "latest"
    return latest.read_text().strip() if latest.is_file() else None


def _as_exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code
