"""What this machine's installation is running on, why, and what would make it faster."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from gigatok_ds.kernels import build, group_norm_ops, native

logger = logging.getLogger(__name__)

_APEX_SYMBOLS = (("apex.normalization", "FusedLayerNorm"), ("apex.optimizers", "FusedAdam"))
_APEX_EXTENSIONS = ("amp_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report, and what to do about it if anything."""

    subject: str
    state: str
    advice: str = ""


def examine(*, build_now: bool = False) -> list[Finding]:
    """Look at everything; with `build_now`, compile the native kernels first, again if that failed before."""
    if build_now:
        build.forget_failure()
        with suppress(build.Unavailable, build.Failed):  # the finding says so
            build.provide(logger.info)
    return [kernels(), norms(), gpu(), *tools(), *packages(), apex()]


def report(findings: Iterable[Finding]) -> str:
    findings = list(findings)
    width = max(len(finding.subject) for finding in findings)
    lines = [f"{finding.subject:{width}}  {finding.state}" for finding in findings]
    advice = [f"- {finding.advice}" for finding in findings if finding.advice]
    return "\n".join([*lines, "", *(["what to do:", *advice] if advice else ["nothing to do"])])


def kernels() -> Finding:
    """Which kernels the quantizer runs. Loads the library if it is compiled, but compiles nothing."""
    def finding(state: str, advice: str = "") -> Finding:
        return Finding(subject="quantizer kernels", state=state, advice=advice)

    if native.kernels_choice() == "torch":
        return finding("plain PyTorch, because GIGATOK_KERNELS=torch", "unset GIGATOK_KERNELS for the native kernels")
    if found := build.locate():
        if others := build.written_by_others(found):
            return finding(f"plain PyTorch: {others}", build.REMEDY)
        library = native.load()
        if library.reason:
            return finding(f"plain PyTorch: the library does not load ({_first_line(library.reason)})",
                           f"remove {build.locate()} and run gigatok-ds doctor --build")
        places = [f"CPU ({torch.ops.gigatok_native.cpu_capability()})"] if "cpu" in library.devices else []
        places += ["CUDA (compiled, not yet run on a GPU by its authors)"] if "cuda" in library.devices else []
        return finding(f"native on {' and '.join(places)}: {library.path}", _cuda_advice(library.devices))
    if build.failure_log().exists():
        return finding(f"plain PyTorch: compiling the native ones failed ({_first_error(build.failure_log())})",
                       f"read {build.failure_log()}, then try again with gigatok-ds doctor --build")
    if missing := build.obstacles():
        return finding(f"plain PyTorch: {'; '.join(missing)}",
                       "install what is missing for kernels over 10 times faster")
    seconds = build.SECONDS[build.wants_cuda()]
    return finding(f"native, to be compiled when first used (once, about {seconds} s)",
                   "gigatok-ds doctor --build compiles the kernels now")


def norms() -> Finding:
    """What normalises maps on GPUs."""
    subject = "group norm on GPUs"
    if group_norm_ops.HAS_TRITON:
        return Finding(subject=subject, state="Triton's kernels, compiled when first used")
    return Finding(
        subject=subject,
        state="torch's own: there is no Triton",
        advice="pip install triton (on a GPU): torch's group norm and SiLU move about three times as many bytes",
    )


def _cuda_advice(devices: tuple[str, ...]) -> str:
    if "cuda" in devices or not torch.cuda.is_available():
        return ""
    if build.toolkit():
        return "there is a GPU and a CUDA toolkit: GIGATOK_BUILD_CUDA=1 gigatok-ds doctor --build compiles for both"
    return f"there is a GPU: with a CUDA {torch.version.cuda} toolkit (nvcc; set CUDA_HOME) it gets kernels, too"


def gpu() -> Finding:
    built_for = f"torch {torch.__version__}, built for " + (f"CUDA {torch.version.cuda}" if torch.version.cuda
                                                            else "CPUs")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    found = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    threads = f"{torch.get_num_threads()} CPU threads"
    return Finding(subject="devices", state=f"{found or 'no GPU'}, {threads} ({built_for})")


def tools() -> list[Finding]:
    """What compiles the kernels."""
    toolkit = build.toolkit()
    found = {
        "C++ compiler": _version(build.compiler()),
        "ninja": _version(build.ninja()),
        "CUDA toolkit": _version(str(toolkit / "bin" / "nvcc") if toolkit else None),
    }
    return [Finding(subject=subject, state=state) for subject, state in found.items()]


def packages() -> list[Finding]:
    """Python packages that training needs; found without importing them."""
    findings = []
    for package in ("deepspeed", "megatron-core"):
        try:
            findings.append(Finding(subject=package, state=metadata.version(package)))
        except metadata.PackageNotFoundError:
            findings.append(Finding(subject=package, state="not installed; training needs it",
                                    advice="pip install 'gigatok_ds[train]' to train"))
    return findings


def apex() -> Finding:
    """NVIDIA's apex by what it defines: another package has the same name, and Megatron-core takes it for this one."""
    try:
        if importlib.util.find_spec("apex") is None:
            return Finding(subject="NVIDIA apex", state="not installed (optional)")
        for module, symbol in _APEX_SYMBOLS:
            getattr(importlib.import_module(module), symbol)
    except Exception as error:  # whatever another package does when it is imported
        return Finding(
            subject="NVIDIA apex", state=f"not installed; what is, is another apex ({type(error).__name__}: {error})",
            advice="pip uninstall apex: Megatron-core takes that package for NVIDIA's and fails when it builds a layer",
        )
    missing = [name for name in _APEX_EXTENSIONS if importlib.util.find_spec(name) is None]
    if missing:
        return Finding(subject="NVIDIA apex", state=f"installed, without {', '.join(missing)}",
                       advice="rebuild apex with its CUDA extensions (APEX_CPP_EXT=1 APEX_CUDA_EXT=1)")
    return Finding(subject="NVIDIA apex", state="installed, with its CUDA extensions")


def _version(program: str | None) -> str:
    """What the program says of its version, and where it is."""
    if program is None:
        return "not found"
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{program} does not run ({_first_line(str(error))})"
    versions = re.findall(r"\d+(?:\.\d+)+", said)
    release = re.search(r"release (\d+\.\d+)", said)  # nvcc's, below a line with a year
    return f"{release[1] if release else versions[0] if versions else 'unknown version'} ({program})"


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


def _first_error(log: Path) -> str:
    """The line of a compiler's log that says most."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    reporting = [line.strip() for line in lines if re.search(r"error:|not found|No space|Killed", line)]
    return (reporting or lines[-1:] or ["it said nothing"])[0][:200]
