"""Where what is kept for a user, and can be made again, lies."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """XDG_CACHE_HOME, or `.cache` of the home directory. Of a user without one, as containers have them, a path at
    which nothing can be made, whose name says why."""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path("/dev/null/this-user-has-no-home;set-XDG_CACHE_HOME")
