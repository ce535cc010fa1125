"""`gigatok-ds export` as a script."""

import sys

from gigatok_ds.cli.main import main

raise SystemExit(main(["export", *sys.argv[1:]]))
