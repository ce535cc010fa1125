"""Shards of 23 samples, and what reading them from servers needs in a test."""

import pytest
from small_shards import write

from gigatok_ds.kernels.build import cache_directory
from gigatok_ds.shards import shard_cache
from gigatok_ds.shards.shard_cache import ShardCache
from gigatok_ds.transport import transports


@pytest.fixture
def shards(tmp_path):
    return write(tmp_path / "shards").directory


@pytest.fixture
def remote_settings(tmp_path, monkeypatch):
    """Attempts follow each other at once, and the default cache is the test's own."""
    monkeypatch.setattr(transports, "BACKOFF", 0.002)
    monkeypatch.setattr(shard_cache, "PATIENCE", 0.0)  # six attempts
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    # Compiled kernels stay where they are.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache_directory().parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache")
