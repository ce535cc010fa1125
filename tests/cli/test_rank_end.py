"""How a process of `python -m gigatok_ds` ends: a rank leaves, whatever libraries do when the interpreter goes down."""

import subprocess
import sys

import pytest

# A library that aborts when the interpreter ends.
COMMAND = """
import atexit, os, runpy, sys

class Library:
    def __del__(self):
        os.abort()

library = Library()
atexit.register(print, "an exit handler ran")
sys.argv = ["gigatok-ds", *sys.argv[1:]]
runpy.run_module("gigatok_ds", run_name="__main__")
"""


def run(monkeypatch, ranks: str, *arguments: str) -> subprocess.CompletedProcess:
    for name, value in {"RANK": "0", "WORLD_SIZE": ranks, "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    return subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("arguments, code", [(["recipes"], 0), (["inspect", "/nowhere"], 2)])
def test_a_rank_is_not_failed_by_what_comes_after_its_work(monkeypatch, arguments, code):
    ended = run(monkeypatch, "2", *arguments)
    assert ended.returncode == code, ended.stderr
    assert "an exit handler ran" in ended.stdout and ("VQ_SS256" in ended.stdout) == (code == 0)
    assert ("error: " in ended.stderr) == (code == 2)


def test_a_process_alone_ends_as_usual(monkeypatch):
    ended = run(monkeypatch, "1", "recipes")
    assert ended.returncode == -6 and "an exit handler ran" in ended.stdout and "VQ_SS256" in ended.stdout
