"""`python -m gigatok_ds`: the same as the `gigatok-ds` command."""

from gigatok_ds.cli.main import main

raise SystemExit(main())
