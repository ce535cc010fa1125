"""Imported last by the server of `rank_runs`: its forks do not look for garbage among all that it has imported, which
takes each of them a tenth of its time and a copy of that memory."""

import gc

from gigatok_ds.compat import timm_library

timm_library()  # without wandb, whose directories would lie in TMPDIR as long as the server lives
gc.collect()
gc.freeze()
