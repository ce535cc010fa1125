"""The tests of the kernels that use a GPU, each a check."""

from __future__ import annotations

import pytest
from processes import CHECKOUT

from acceptance.findings import Findings
from acceptance.section import Setting

FILES = ("kernels/test_kernel_ops.py", "kernels/test_kernels_on_gpu.py", "kernels/test_triton_on_gpu.py",
         "data/test_prefetch.py")
# On a CPU: that tests run and are told of.
_QUICK = "cpu-native and (ties or every_bit or histogram or not_finite)"


def run(setting: Setting, found: Findings) -> None:
    chosen = ["-m", "gpu"] if setting.on_gpu else ["-k", _QUICK]
    files = [str(CHECKOUT / "tests" / name) for name in FILES]
    recorder = _Recorder(found)
    code = pytest.main(["-o", "addopts=", "-p", "no:cacheprovider", "-q", "--rootdir", str(CHECKOUT), *chosen, *files],
                       plugins=[recorder])
    for reason, count in recorder.skipped.items():
        found.lacks(f"{count} tests: {reason}")
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        found.check("the tests have run", False, f"pytest ended with {pytest.ExitCode(code).name}; its output says why")


class _Recorder:
    """A plugin that turns reports into checks."""

    def __init__(self, found: Findings):
        self.found, self.skipped = found, {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self.skipped[reason] = self.skipped.get(reason, 0) + 1
        elif report.failed:
            lines = report.longreprtext.strip().splitlines()
            said = next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1] if lines else "")
            self.found.check(_name(report.nodeid), False, said[:200])
        elif report.when == "call":
            self.found.check(_name(report.nodeid), True)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.found.check(f"{report.nodeid} can be read", False, str(report.longrepr).strip().splitlines()[-1][:200])


def _name(node: str) -> str:
    return node.rpartition("/")[2].removeprefix("test_").replace(".py::test_", ": ")
