"""`gigatok-ds inspect` as a script."""

import sys

from gigatok_ds.cli.main import main

raise SystemExit(main(["inspect", *sys.argv[1:]]))
