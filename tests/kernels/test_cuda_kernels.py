"""The CUDA kernels compile for every GPU we promise, without spilling registers. No GPU is needed."""

import functools

import pytest
from benchmark_scripts import loaded

from gigatok_ds.errors import InputError
from gigatok_ds.kernels import build


@pytest.fixture(scope="module")
def resources():
    with loaded("cuda_resources") as module:
        module.compiled_kernels = functools.cache(module.compiled_kernels)  # that of an architecture takes ten seconds
        yield module


@pytest.mark.parametrize("architecture", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 100))])
def test_kernels_compile_without_spilling(resources, architecture):
    if build.toolkit() is None:
        pytest.skip("no CUDA toolkit (nvcc) on this machine")
    kernels = resources.compiled_kernels(architecture)
    assert {kernel.dim for kernel in kernels} == {4, 8, 16, 32, 64}
    # Five sweeps in five dimensions; the filter on tensor cores, and distances after it.
    assert len(kernels) == 5 * 5 + 3
    assert [kernel for kernel in kernels if kernel.spilled_bytes and kernel.dim <= 32] == []
    assert max(kernel.shared_bytes for kernel in kernels) <= 48 * 1024


@pytest.mark.skipif(build.toolkit() is None, reason="no CUDA toolkit (nvcc) on this machine")
def test_the_script_tells_what_all_of_them_take(resources, capsys):
    assert resources.main([]) == 0
    table = capsys.readouterr().out
    assert all(f"sm_{architecture}: regs" in table for architecture in (80, 90, 100))
    rows = [line for line in table.splitlines() if line.startswith("search and softmax")]
    assert [row.split("|")[0].split()[-1] for row in rows] == ["4", "8", "16", "32", "64"]


def test_the_report_of_the_assembler_is_read(resources):
    report = """ptxas info    : Function properties for _ZN7gigatok12sweep_kernelINS_8one_lane6AssignIfLi8ELb1EEEEEvT_
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 61 registers, used 1 barriers, 9216 bytes smem
"""
    assert list(resources.kernels_in(report)) == [
        resources.Kernel(name="search and softmax", dim=8, registers=61, shared_bytes=9216, spilled_bytes=32)]


def test_without_a_toolkit_the_error_says_so(resources, monkeypatch, capsys):
    monkeypatch.setattr(build, "toolkit", lambda: None)
    resources.compiled_kernels.cache_clear()
    with pytest.raises(InputError, match="no CUDA toolkit"):
        resources.compiled_kernels(90)
    assert resources.main([]) == 2 and "set CUDA_HOME" in capsys.readouterr().err
