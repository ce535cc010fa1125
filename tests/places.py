"""Where things lie in this repository."""

from pathlib import Path

TESTS = Path(__file__).parent
HELPERS = Path(__file__).parent  # modules and scripts that tests use
GOLDEN = TESTS / "golden"
ROOT = TESTS.parent
PACKAGE = ROOT / "gigatok_ds"
