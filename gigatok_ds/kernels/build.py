"""Compile the native kernels of csrc/ into one shared library, or find the one that was compiled before.

A library fits one state of the sources and one kind of machine, its name says which, and every torch since 2.11, for it
uses only torch's stable C++ interface. It is looked for next to this file, where `setup.py` leaves it, then in a cache
directory of the user, into which it is compiled when first needed. As a script (`python build.py LIBRARY SOURCES
[--cuda]`) this file compiles, in a process of its own: a compiler's or a library's failure must not be that of a
training run. It needs nothing of gigatok_ds, since `setup.py` runs it, too.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

NAME = "gigatok_native"
SOURCES = Path(__file__).parent / "csrc"
PREBUILT = Path(__file__).parent / "prebuilt"
OPERATORS = ("nearest_code", "entropy_forward", "entropy_backward", "code_histogram", "few_row_product",
             "winograd_tiles", "winograd_maps", "cpu_capability")
SECONDS = {False: 40, True: 120}  # to compile, roughly: for CPUs only, and with CUDA
_TIMEOUT = 1800.0
_TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable interface of torch 2.11
_HOST_FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi", _TORCH]
DEVICE_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "--extended-lambda", "--expt-relaxed-constexpr",
                 "-DUSE_CUDA", _TORCH]


class Unavailable(Exception):
    """There is no library, and it cannot be compiled here; the message says what is missing."""


class Failed(Exception):
    """Compiling was tried and failed; the message names the log."""


def locate() -> Path | None:
    """The library that fits this process, if it has been compiled."""
    cuda = wants_cuda()
    prebuilt = _prebuilt()
    cached = library_path()
    for path in (prebuilt.get(True), cached, None if cuda else prebuilt.get(False)):
        if path and path.exists():
            return path
    return None


def written_by_others(path: Path) -> str | None:
    """What lets another user decide what code a cached library holds, or None.

    The library and its directory must be this user's or the system's and nobody else's to write, and no directory above
    may be everybody's, unless it keeps what is in it from being replaced (the sticky bit, as of /tmp). Libraries beside
    this file are as trustworthy as this file.
    """
    if path.parent == PREBUILT:
        return None
    place = path.resolve()
    for number, part in enumerate((place, *place.parents)):
        if not part.exists():
            continue
        status = part.stat()
        if number < 2 and status.st_uid not in (0, os.geteuid()):
            return f"{part} belongs to another user, who could put any code there"
        writable = status.st_mode & (0o022 if number < 2 else 0o002)
        if writable and not (number >= 2 and status.st_mode & stat.S_ISVTX):
            return f"other users can write {part}, and could put any code there"
    return None


REMEDY = (
    "remove it, or chmod go-w it if you trust what is in it, or set TORCH_EXTENSIONS_DIR to a directory of your own"
)


def _refuse_others(path: Path) -> None:
    if said := written_by_others(path):
        raise Failed(f"{said}; {REMEDY}")


def provide(announce: Callable[[str], None]) -> Path:
    """The library, compiled now if need be, once for all processes of this machine; the others wait.

    `announce` gets one line before it takes long. A failure is remembered until `forget_failure`. Raises Unavailable or
    Failed, that also where another user could have written the library; an OSError of the cache directory becomes
    Unavailable.
    """
    if found := locate():
        _refuse_others(found)
        return found
    if missing := obstacles():
        raise Unavailable("; ".join(missing))
    path = library_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_others(path)
        with _locked(path.with_suffix(".lock")):
            if not path.exists() and not failure_log().exists():
                announce(f"compiling the native kernels once (about {SECONDS[wants_cuda()]} s)")
                if said := compile_apart(path, wants_cuda()):
                    failure_log().write_text(said, encoding="utf-8")
    except OSError as error:
        raise Unavailable(f"cannot write {path.parent}: {error.strerror or error}") from error
    if not path.exists():
        raise Failed(f"compiling them failed; the compiler's messages are in {failure_log()}")
    _refuse_others(path)
    return path


def library_path() -> Path:
    """Where the library of this process is cached."""
    return cache_directory() / library_name(wants_cuda())


def library_name(cuda: bool) -> str:
    """The name, with the sources' state and the compute capabilities in it."""
    variant = "cuda-" + re.sub(r"[^0-9a-zA-Z.]", "-", _architectures()) if cuda else "cpu"
    return f"{NAME}-{_fingerprint()}-{variant}.so"


def failure_log() -> Path:
    """What compiling said when it failed; exists only then."""
    return library_path().with_suffix(".failed.log")


def forget_failure() -> None:
    failure_log().unlink(missing_ok=True)


def cache_directory() -> Path:
    from gigatok_ds.user_cache import user_cache  # here, since setup.py reads this file without the package

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or user_cache()) / "gigatok_ds"


def obstacles() -> list[str]:
    """What keeps the kernels from being compiled here."""
    missing = []
    if os.name != "posix":
        return ["they are compiled on Linux only"]
    if not any(SOURCES.glob("*.cpp")):
        missing.append(f"their sources are not in {SOURCES}")
    if not compiler():
        missing.append("no C++ compiler (install g++, or set CXX)")
    if not ninja():
        missing.append("no ninja (pip install ninja)")
    if not importlib.util.find_spec("setuptools"):
        missing.append("no setuptools (pip install setuptools)")
    if os.environ.get("GIGATOK_BUILD_CUDA") == "1" and not toolkit():
        missing.append("GIGATOK_BUILD_CUDA=1, but no CUDA toolkit (set CUDA_HOME)")
    return missing


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "c++")


def ninja() -> str | None:
    return shutil.which("ninja", path=_search_path())


def toolkit() -> Path | None:
    """The CUDA toolkit's own directory. An nvcc on the PATH may be a script elsewhere, so headers decide."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda",
                  Path(nvcc).resolve().parent.parent if nvcc else None]
    for candidate in candidates:
        home = Path(candidate) if candidate else None
        if home and (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def wants_cuda() -> bool:
    """Compile for GPUs, too? As GIGATOK_BUILD_CUDA says, else where there is a GPU and a toolkit."""
    forced = os.environ.get("GIGATOK_BUILD_CUDA")
    if forced in ("0", "1"):
        return forced == "1"
    import torch

    return torch.version.cuda is not None and torch.cuda.is_available() and toolkit() is not None


def _architectures() -> str:
    """Compute capabilities to compile for, as TORCH_CUDA_ARCH_LIST: this machine's, or all we know without a GPU."""
    import torch

    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return chosen
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found)) or "8.0;9.0;10.0"


def _prebuilt() -> dict[bool, Path]:
    """Libraries of `setup.py` that fit, by whether they hold CUDA kernels."""
    return {"-cuda" in path.name: path for path in PREBUILT.glob(f"{NAME}-{_fingerprint()}-*.so")}


@functools.cache
def _fingerprint() -> str:
    """Names what a library depends on besides the variant: sources, flags, machine."""
    digest = hashlib.sha256(repr((platform.machine(), _HOST_FLAGS, DEVICE_FLAGS)).encode())
    for path in sorted(SOURCES.glob("*")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _search_path() -> str:
    """PATH, and where pip puts ninja when the environment is not activated."""
    return os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system releases when its holder dies. Where the file system has none, go on without."""
    import fcntl

    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_apart(path: Path, cuda: bool) -> str:
    """Compile in a process of its own, which writes `path`. Returns what it said if it failed, else nothing."""
    environment = os.environ | {"PATH": _search_path()}
    if cuda:
        environment |= {"CUDA_HOME": str(toolkit()), "TORCH_CUDA_ARCH_LIST": _architectures()}
    # -P: this directory's file names must not shadow other modules.
    command = [sys.executable, "-P", __file__, str(path), str(SOURCES), *(["--cuda"] if cuda else [])]
    try:
        finished = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True, errors="replace", timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"still compiling after {_TIMEOUT:.0f} s"
    return f"{finished.stdout}\nexit code {finished.returncode}" if finished.returncode else ""


def compile_library(path: Path, folder: Path, cuda: bool) -> None:
    """Compile the sources of `folder` into `path`, once the library has worked in this process."""
    import torch
    from torch.utils import cpp_extension

    sources = sorted(folder.glob("*.cpp")) + (sorted(folder.glob("*.cu")) if cuda else [])
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as scratch:
        cpp_extension.load(
            name=NAME, sources=[str(source) for source in sources], build_directory=scratch, with_cuda=cuda,
            extra_cflags=_HOST_FLAGS, extra_cuda_cflags=DEVICE_FLAGS, is_python_module=False, verbose=True,
            # A toolkit may keep its runtime in lib/ alone, where torch does not look.
            extra_ldflags=[f"-L{os.environ['CUDA_HOME']}/lib"] if cuda else [],
        )
        kernels = getattr(torch.ops, NAME)
        for operator in OPERATORS:
            getattr(kernels, operator)
        try_kernels(kernels, "cpu")
        for index in range(torch.cuda.device_count() if cuda else 0):
            try_kernels(kernels, f"cuda:{index}")
        library = Path(scratch) / f"{NAME}.so"
        library.chmod(library.stat().st_mode & ~0o022)  # whatever the umask: nobody else decides what code runs
        os.replace(library, path)


def try_kernels(kernels, device: str) -> None:
    """Run the quantizer's kernels on `device`, on little of which the answer is known; Failed if they do not give it.

    A kernel that was compiled for another GPU fails here and not in the first step of training.
    """
    import torch

    for dim in (8, 16):  # on a GPU: on its tensor cores, and not
        latents = torch.cat([torch.eye(dim), -torch.eye(dim)])
        codes = torch.cat([latents.new_full((500, dim), 9.0), latents.flip(0), latents])
        z, e = latents.to(device), codes.to(device)
        try:
            nearest = kernels.nearest_code(z, e).tolist()
            indices, entropy, average, state = kernels.entropy_forward(z, e, 1.0)
            ones = torch.ones_like(entropy), torch.ones_like(average)
            gradients = kernels.entropy_backward(z, e, indices, state, *ones, 1.0)
            known = z.new_tensor([3, 3, 0, -1, dim], dtype=torch.int64)
            histogram = kernels.code_histogram(known, 4).tolist()
        except RuntimeError as error:
            raise Failed(f"error: the kernels do not run on {_described(device)}: {error}") from error
        soft = (-torch.cdist(latents.double(), codes.double()).square()).softmax(-1)
        right = nearest == indices.tolist() == [500 + 2 * dim - 1 - row for row in range(2 * dim)]
        right &= histogram == [1, 0, 0, 2]
        right &= (average.cpu() - soft.mean(0)).abs().max().item() < 1e-5
        right &= (entropy.cpu() + torch.special.xlogy(soft, soft).sum(-1)).abs().max().item() < 1e-4
        if not right or not all(gradient.isfinite().all() for gradient in gradients):
            raise Failed(f"error: the kernels compute wrong numbers on {_described(device)}")


def _described(device: str) -> str:
    import torch

    if device == "cpu":
        return "this CPU"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{device} ({torch.cuda.get_device_name(device)}, compute capability {major}.{minor}; they were compiled for "
        f"{_architectures()}, see TORCH_CUDA_ARCH_LIST)"
    )


if __name__ == "__main__":
    try:
        compile_library(Path(sys.argv[1]), Path(sys.argv[2]), "--cuda" in sys.argv[3:])
    except Failed as failure:
        raise SystemExit(str(failure)) from None
