"""`python -m gigatok_ds`: the same as the `gigatok-ds` command, and how every rank of a launcher runs it."""

import atexit
import contextlib
import os
import sys

try:
    from gigatok_ds.cli.main import main
    from gigatok_ds.cluster.launched import launched_rank_or_alone
except KeyboardInterrupt:  # later ones are main's
    raise SystemExit(130) from None


def end(code: int) -> None:
    """End this process; a rank without taking the interpreter down.

    Ranks were seen to abort at their exit with their work done, probably in a library's thread that met an interpreter
    half gone; the launcher then calls the run failed.
    """
    if launched_rank_or_alone().is_alone:
        raise SystemExit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())
