"""`gigatok-ds import-gigatok` as a script."""

import sys

from gigatok_ds.cli.main import main

raise SystemExit(main(["import-gigatok", *sys.argv[1:]]))
