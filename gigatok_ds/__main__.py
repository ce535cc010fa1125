"""`python -m gigatok_ds`: the same as the `gigatok-ds` command, and how every rank of a launcher runs it."""

import atexit
import contextlib
import os
import sys

from gigatok_ds.cli.main import main


def end(code: int) -> None:
    """End this process; a rank without taking the interpreter down.

    Threads of libraries, Gloo's say, outlive a rank's work. One that then meets an interpreter half gone aborts the process,
    and the launcher calls a run failed whose work is done.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise SystemExit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())
