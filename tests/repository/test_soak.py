"""The soak in a short form: random faults for two minutes, and the same bits as without them."""

import subprocess
import sys

import pytest
from benchmark_scripts import BENCHMARKS

SCRIPT = BENCHMARKS / "soak.py"


@pytest.mark.slow
def test_two_minutes_of_faults_change_nothing(tmp_path):
    finished = subprocess.run([sys.executable, SCRIPT, "--minutes", "2", "--mean", "20", "--steps", "40", "--keep",
                               tmp_path],
                              capture_output=True, text=True, check=False, timeout=1200)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "the same bits, the same lines, none" in finished.stdout
