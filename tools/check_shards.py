"""`gigatok-ds check-shards` as a script."""

import sys

from gigatok_ds.cli.main import main

raise SystemExit(main(["check-shards", *sys.argv[1:]]))
