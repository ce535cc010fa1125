"""Libraries that import more than we need of them, imported without that."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def without_wandb() -> Iterator[None]:
    """What is imported within does not find wandb, unless it is imported already.

    timm and megatron-core import it wherever it is installed: a second, and directories for its media in TMPDIR, which
    stay when the process is killed.
    """
    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = None
    try:
        yield
    finally:
        if hidden:
            del sys.modules["wandb"]


@functools.cache
def timm_library() -> ModuleType:
    with without_wandb():
        import timm
    return timm
