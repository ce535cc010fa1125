"""What launch/train.sh runs: its own options, then `gigatok-ds train` on every rank.

    python -m gigatok_ds.cli.launcher [--dry-run] [--max-restarts N] [--min-hosts N] ARGUMENT... of gigatok-ds train
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gigatok_ds.cli.main import parse
from gigatok_ds.cli.messages import messages_shown
from gigatok_ds.cluster.launch import Options, described, plan, start
from gigatok_ds.errors import InputError

logger = logging.getLogger("gigatok_ds.cli.launcher")  # it is run by `python -m`


def main(argv: Sequence[str]) -> int:
    with messages_shown("train.sh: "):
        try:
            return _run(argv)
        except (InputError, OSError) as error:
            logger.error("%s", error)
    return 2


def _run(argv: Sequence[str]) -> int:
    options, arguments = Options.taken_from(argv)
    launch = plan(arguments, os.environ, home=Path.home(), working_dir=Path.cwd())
    # Restarts depend on where the checkpoints are, which only the command line's own parser can say for sure.
    run_dir = parse(["train", *arguments]).out if options.max_restarts else None
    if launch.note:
        logger.info("%s", launch.note)
    if options.dry_run:
        print(described(launch, os.environ))
        return 0
    return start(launch, options, arguments, os.environ, run_dir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
