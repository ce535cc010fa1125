"""`gigatok-ds convert` as a script."""

import sys

from gigatok_ds.cli.main import main

raise SystemExit(main(["convert", *sys.argv[1:]]))
