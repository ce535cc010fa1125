"""What ruff and mypy look for, as pyproject.toml says, is nowhere in the repository."""

import subprocess
import sys

from places import ROOT


def finds_nothing(*command):
    found = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_ruff_finds_nothing():
    finds_nothing("ruff", "check", "--no-cache", "--output-format", "concise", ".")


def test_mypy_finds_nothing():
    """From its cache, .mypy_cache, in seconds; the first time in a minute or two."""
    finds_nothing("mypy")
