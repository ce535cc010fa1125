"""What ruff looks for, as pyproject.toml says, is nowhere in the repository."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_ruff_finds_nothing():
    found = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", ROOT],
                           capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
