"""Where things lie in this repository."""

from pathlib import Path

HELPERS = Path(__file__).parent  # modules and scripts that tests use
TESTS = HELPERS.parent
GOLDEN = TESTS / "golden"
ROOT = TESTS.parent
PACKAGE = ROOT / "gigatok_ds"
