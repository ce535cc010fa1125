"""Every kernel of ours on small shapes, under each tool of NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from acceptance.findings import Findings
from acceptance.section import Setting
from acceptance.sections import programs_path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# torch's allocator would hide what lies beyond a tensor, and what was written there before.
_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "GIGATOK_KERNELS": "native"}
_ERROR = 97


def run(setting: Setting, found: Findings) -> None:
    if not setting.on_gpu:
        found.lacks("it looks at GPUs only")
        return
    sanitizer = shutil.which("compute-sanitizer", path=programs_path())
    for left, tool in zip(range(len(TOOLS), 0, -1), TOOLS, strict=True):
        seconds = found.seconds_left() / left - 1
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(_ERROR), sys.executable, "-m",
                   "acceptance.small_shapes"]
        try:
            finished = subprocess.run(command, cwd=Path(__file__).parents[1], env=os.environ | _ENVIRONMENT,
                                      timeout=seconds,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        except subprocess.TimeoutExpired:
            found.lacks(f"{tool}: it takes longer than {seconds:.0f} s")
            continue
        print(finished.stdout, flush=True)
        if re.search(r"not supported|Unable to (launch|find)", finished.stdout):
            found.lacks(f"{tool}: {_telling(finished.stdout)}")
        else:
            found.check(f"{tool} finds nothing", finished.returncode == 0, _telling(finished.stdout))


def _telling(output: str) -> str:
    """The line that sums up, or else the last."""
    lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
    reporting = [line for line in lines if re.search(r"SUMMARY|not supported|Unable to|InputError", line)]
    return (reporting or lines or ["it said nothing"])[-1][:200]
