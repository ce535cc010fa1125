"""Finding and compiling the native kernels, falling back without them, and gigatok-ds doctor, which explains it."""

import argparse
import functools
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from gigatok_ds.cli.training import doctor as command
from gigatok_ds.kernels import build, group_norm_ops, installation, native, reference
from gigatok_ds.kernels.ops import nearest_code

COMPILER, NINJA = build.compiler, build.ninja


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine on which nothing has been compiled, with sources that compile without being looked at."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "kernels.cpp").write_text("int sources;")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(build, "_fingerprint", build._fingerprint.__wrapped__)
    monkeypatch.setattr(native, "load", functools.cache(native.load.__wrapped__))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    for name in ("GIGATOK_KERNELS", "GIGATOK_BUILD_CUDA", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "compiler", lambda: "/bin/true")
    monkeypatch.setattr(build, "ninja", lambda: "/bin/true")
    return tmp_path


def finding(subject):
    return next(found for found in installation.examine() if found.subject == subject)


def search_works():
    return nearest_code(torch.eye(4), torch.eye(4)).tolist() == [0, 1, 2, 3]


def test_the_command_reports_every_subject(capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([])) == 0
    printed = capsys.readouterr().out
    for subject in ("quantizer kernels", "group norm on GPUs", "devices", "C++ compiler", "ninja", "CUDA toolkit",
                    "deepspeed", "megatron-core", "NVIDIA apex"):
        assert sum(line.startswith(subject + "  ") for line in printed.splitlines()) == 1
    assert torch.__version__ in printed


def test_without_a_compiler_everything_works_silently(machine, monkeypatch, capfd):
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert search_works()
    assert capfd.readouterr().err == ""
    found = finding("quantizer kernels")
    assert "no C++ compiler" in found.state and "install" in found.advice


def test_a_failure_is_one_line_and_is_not_repeated(messages, machine, monkeypatch, capfd):
    """With the real compiler, on a source that it refuses."""
    monkeypatch.setattr(build, "compiler", COMPILER)
    monkeypatch.setattr(build, "ninja", NINJA)
    monkeypatch.setenv("GIGATOK_BUILD_CUDA", "0")
    if missing := build.obstacles():
        pytest.skip("; ".join(missing))
    (machine / "csrc" / "kernels.cpp").write_text("#error this will not do\n")
    for attempt in range(2):
        monkeypatch.setattr(native, "load", functools.cache(native.load.__wrapped__))
        start = time.perf_counter()
        assert search_works()
        said = capfd.readouterr().err.splitlines()
        assert [line.startswith("compiling the native kernels once") for line in said] == [True, False][attempt:]
        assert said[-1].startswith("warning: ") and "gigatok-ds doctor says why" in said[-1]
    assert time.perf_counter() - start < 1
    found = finding("quantizer kernels")
    assert "this will not do" in found.state and str(build.failure_log()) in found.advice
    assert "this will not do" in build.failure_log().read_text()
    assert [path.suffix for path in (machine / "cache" / "gigatok_ds").iterdir() if path.is_dir()] == []
    (machine / "csrc" / "kernels.cpp").write_text("int mended;")
    assert "to be compiled when first used" in finding("quantizer kernels").state


class Kernels:
    """The native kernels' part in `try_kernels`, by other means, with one of them replaced."""

    def __init__(self, name, replacement):
        setattr(self, name, replacement)

    nearest_code, entropy_forward = staticmethod(reference.nearest_code), staticmethod(reference.entropy_forward)

    @staticmethod
    def entropy_backward(z, e, indices, state, *gradients):
        return reference.entropy_backward(z, e, *gradients)

    @staticmethod
    def code_histogram(codes, size):
        return torch.bincount(codes[(codes >= 0) & (codes < size)], minlength=size)


@pytest.mark.parametrize("name, result", [
    ("nearest_code", lambda z, e: torch.full((len(z),), 500)),
    ("entropy_forward", lambda z, e, t: tuple(1.001 * part for part in reference.entropy_forward(z, e, t))),
    ("entropy_backward", lambda z, e, *_: (z * torch.nan, e)),
    ("code_histogram", lambda codes, size: torch.zeros(size, dtype=torch.int64)),
])
def test_kernels_are_tried_before_they_are_relied_on(name, result):
    build.try_kernels(Kernels("unused", None), "cpu")
    with pytest.raises(build.Failed, match="wrong numbers on this CPU"):
        build.try_kernels(Kernels(name, result), "cpu")

    def fails(*_):
        raise RuntimeError("no kernel image")

    with pytest.raises(build.Failed, match="do not run on this CPU: no kernel image"):
        build.try_kernels(Kernels(name, fails), "cpu")


def test_kernels_of_another_gpu_leave_plain_torch_and_a_reason(messages, machine, monkeypatch, capfd):
    """The real kernels' process, in which the trial on the (named) GPU fails."""
    script = machine / "build.py"
    said = "error: the kernels do not run on cuda:0"
    script.write_text(Path(build.__file__).read_text().replace(
        "def compile_library(", f"def compile_library(*_):\n    raise Failed({said!r})\n\n\ndef _compile_library("))
    monkeypatch.setattr(build, "__file__", str(script))
    assert search_works()
    assert "plain PyTorch" in capfd.readouterr().err
    assert f"failed ({said})" in finding("quantizer kernels").state


def test_asking_again_tries_again(machine, monkeypatch):
    monkeypatch.setattr(build, "compile_apart", lambda path, cuda: "error: no space")
    installation.examine(build_now=True)
    assert build.failure_log().read_text() == "error: no space" and not build.library_path().exists()
    monkeypatch.setattr(build, "compile_apart", lambda path, cuda: path.write_text("library") and "")
    installation.examine(build_now=True)
    assert not build.failure_log().exists() and build.library_path().exists()
    assert "the library does not load" in finding("quantizer kernels").state  # it is a text


def test_of_several_ranks_one_compiles(machine, monkeypatch):
    compiled, told = [], []

    def compile_slowly(path, cuda):
        compiled.append(path)
        time.sleep(0.3)
        path.write_text("library")
        return ""

    monkeypatch.setattr(build, "compile_apart", compile_slowly)
    found = []
    ranks = [threading.Thread(target=lambda: found.append(build.provide(told.append))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert found == [build.library_path()] * 4
    assert len(compiled) == len(told) == 1 and "once (about" in told[0]


def test_a_cache_that_cannot_be_written_is_no_failure(machine, monkeypatch):
    (machine / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(machine / "file"))
    assert search_works()
    assert "cannot write" in native.load().reason


def test_a_library_fits_its_sources_and_devices(machine, monkeypatch):
    def name():
        return build.library_path().name

    first = name()
    (machine / "csrc" / "tile.h").write_text("")
    second = name()
    monkeypatch.setenv("GIGATOK_BUILD_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0 10.0+PTX")
    assert len({first, second, name()}) == 3
    assert "cuda-9.0-10.0-PTX" in name() and "-cpu" in first


def test_a_library_beside_the_package_comes_first(machine, monkeypatch):
    (machine / "prebuilt").mkdir()
    (machine / "prebuilt" / build.library_path().name.replace("-cpu", "-cuda-9.0")).write_text("")
    assert "-cuda-9.0" in build.locate().name
    (machine / "csrc" / "kernels.cpp").write_text("int changed;")
    assert build.locate() is None


def test_a_toolkit_is_where_its_headers_are(machine, monkeypatch):
    shim, real = machine / "shim", machine / "real"
    for home in (shim, real):
        (home / "bin").mkdir(parents=True)
        (home / "bin" / "nvcc").write_text("#!/bin/sh\n")
        (home / "bin" / "nvcc").chmod(0o755)
    (real / "include").mkdir()
    (real / "include" / "cuda_runtime.h").write_text("")
    monkeypatch.setenv("CUDA_HOME", str(shim))
    assert build.toolkit() != shim
    monkeypatch.setenv("CUDA_HOME", str(real))
    assert build.toolkit() == real


@pytest.mark.parametrize("there, said", [(True, "Triton's kernels"), (False, "there is no Triton")])
def test_what_normalises_maps_on_gpus_is_told(monkeypatch, there, said):
    monkeypatch.setattr(group_norm_ops, "HAS_TRITON", there)
    found = finding("group norm on GPUs")
    assert said in found.state and bool(found.advice) != there


@pytest.mark.parametrize("content, extensions, expected", [
    ("raise RuntimeError('a web toolkit')", (), "another apex (RuntimeError: a web toolkit)"),
    ("", (), "another apex"),
    ("class FusedLayerNorm: ...\nclass FusedAdam: ...", ("amp_C",), "without fused_layer_norm_cuda"),
    ("class FusedLayerNorm: ...\nclass FusedAdam: ...", installation._APEX_EXTENSIONS, "with its CUDA extensions"),
])
def test_apex_is_known_by_what_it_defines(tmp_path, monkeypatch, content, extensions, expected):
    (tmp_path / "apex").mkdir()
    for name in ("__init__", "normalization", "optimizers"):
        (tmp_path / "apex" / f"{name}.py").write_text(content)
    for name in extensions:
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    assert expected in installation.apex().state
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]
