"""What a run was run with, so that it can be repeated; nothing that tells who ran it or on which machine."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from gigatok_ds.config.location import masked
from gigatok_ds.files import write_atomically

ENVIRONMENT_FILE = "environment.json"
PACKAGES = ("gigatok_ds", "torch", "deepspeed", "megatron-core", "numpy", "timm", "lpips", "webdataset",
            "torch-fidelity")
_SOURCE = Path(__file__).resolve().parents[1]


def write_environment(run_dir: str | Path, *, command: list[str]) -> None:
    """Write environment.json: versions (null: not installed), CUDA devices, command, git commit, UTC time.

    In the command, home directories become ~ and user names <user>, secrets of URLs are masked, and the program loses
    its directory.
    """
    import torch

    commit, modified = git_state(_SOURCE)
    content = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [_program(Path(command[0])), *(masked(anonymise(word)) for word in command[1:])],
        "git_commit": commit,
        "git_modified": modified,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    write_atomically(Path(run_dir) / ENVIRONMENT_FILE, (json.dumps(content, indent=2) + "\n").encode())


def _program(path: Path) -> str:
    return f"python -m {path.parent.name}" if path.name == "__main__.py" else path.name


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def anonymise(argument: str) -> str:
    """Take home directories and user names out of the paths in a command-line argument."""
    home = os.path.expanduser("~").rstrip("/")
    if home.startswith("/"):
        argument = re.sub(rf"(?<![\w./-]){re.escape(home)}(?![\w.-])", "~", argument)
    argument = re.sub(r"/(home|Users)/[^/\s\"',]+", r"/\1/<user>", argument)
    user = _user_name()
    return re.sub(rf"/{re.escape(user)}(?=[/\s\"',]|$)", "/<user>", argument) if user else argument


def _user_name() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container may run under a number without a name
        return None


def git_state(source: Path) -> tuple[str | None, bool | None]:
    """The commit that `source` is checked out at, and whether files differ from it; else (None, None).

    Only a directory whose files are tracked counts: a virtual environment may lie in another checkout.
    """
    if _git(source, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit, changes = _git(source, "rev-parse", "HEAD"), _git(source, "status", "--porcelain", "--", ".")
    return (None, None) if commit is None or changes is None else (commit, bool(changes))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        finished = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True,
                                  timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout.strip() if finished.returncode == 0 else None
