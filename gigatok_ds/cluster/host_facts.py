"""What one host is able to run, as one line of JSON on standard output.

    python -m gigatok_ds.cluster.host_facts '{"recipe": NAME_OR_YAML, "token": PATH, "answer": PATH, "working_dir":
      DIR}'

`gigatok-ds check-cluster` runs this on every host by the python and from the checkout that training would use there.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from gigatok_ds.errors import InputError

MARK = "gigatok-ds-probe "  # a login shell may print its own lines around ours
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a host. Paths are absolute; None: do not look."""

    recipe: str | None = None
    token: str | None = None  # a file that the asking host wrote
    answer: str | None = None  # a file for this host to write
    working_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a host answered. None: not there, or not asked."""

    devices: list[str] = field(default_factory=list)  # names of its GPUs
    versions: dict[str, str | None] = field(default_factory=dict)
    device_error: str | None = None
    code: str | None = None
    recipe: str | None = None
    recipe_error: str | None = None
    token: str | None = None  # what the file of the asking host says here
    write_error: str | None = None
    working_dir_exists: bool = True


def look(question: Question) -> Facts:
    """Answer for this machine."""
    devices, cuda, device_error = _devices()
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {name: _version(name) for name in ("torch", "deepspeed", "megatron-core")}
    versions |= cuda
    recipe, recipe_error = _recipe(question.recipe)
    return Facts(
        devices=devices, versions=versions, device_error=device_error, code=source_hash(PACKAGE),
        recipe=recipe, recipe_error=recipe_error, token=_read(question.token),
        write_error=_write(question.answer),
        working_dir_exists=question.working_dir is None or Path(question.working_dir).is_dir(),
    )


def source_hash(package: Path) -> str:
    """SHA-256 of the package's files, names and contents; what Python compiles from them does not count."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def recipe_hash(name_or_path: str) -> str:
    """SHA-256 of a recipe with its bases and defaults filled in. Raises InputError where it is not one."""
    from gigatok_ds.config.load import load_recipe, recipe_to_yaml

    return hashlib.sha256(recipe_to_yaml(load_recipe(name_or_path)).encode()).hexdigest()


def _recipe(name_or_path: str | None) -> tuple[str | None, str | None]:
    if name_or_path is None:
        return None, None
    try:
        return recipe_hash(name_or_path), None
    except (InputError, OSError, ImportError) as error:
        return None, str(error)


def _devices() -> tuple[list[str], dict[str, str | None], str | None]:
    """Names of the GPUs, versions of NCCL and driver (None without a GPU), and why torch could not tell."""
    versions: dict[str, str | None] = {"nccl": None, "driver": _driver()}
    try:
        import torch

        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if names:
            versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception as error:  # a broken CUDA or torch installation may raise anything: that is what is asked
        return [], versions, f"{type(error).__name__}: {error}"
    return names, versions, None


def _driver() -> str | None:
    try:
        answer = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                                capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.split()), None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str | None) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8") if path else None
    except OSError:
        return None


def _write(path: str | None) -> str | None:
    """Write an answer that the asking host looks for; returns why that was not possible."""
    try:
        if path:
            Path(path).write_text(Path(path).name, encoding="utf-8")
    except OSError as error:
        return error.strerror or str(error)
    return None


if __name__ == "__main__":
    print(MARK + json.dumps(asdict(look(Question(**json.loads(sys.argv[1]))))), flush=True)
