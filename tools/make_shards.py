"""`gigatok-ds make-shards` as a script."""

import sys

from gigatok_ds.cli.main import main

raise SystemExit(main(["make-shards", *sys.argv[1:]]))
