"""The environment of ranks that are started over ssh.

DeepSpeed's launcher exports on the other hosts: variables whose names start with PYTHON, MLFLOW, MV2, UCX and, when the
launching machine has a GPU, NCCL; and the NAME=value lines of `.deepspeed_env` in the home and then in the working
directory. PATH and everything else stay behind. Here those lines are read, and the variables that training listens to
are added, unless the file already says something about them.

Values are text inside double quotes for the remote shell: that is what DeepSpeed writes (MultiNodeRunner.add_export).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gigatok_ds.errors import InputError

ENV_FILE = ".deepspeed_env"
ENV_FILE_VARIABLE = "DS_ENV_FILE"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SPECIAL = re.compile(r"[^\w@%+=:,./-]")  # the characters that make DeepSpeed quote a value

# Whole names where a prefix would also take credentials along (HF_TOKEN) or what belongs to one host.
_PREFIXES = ("OMP_", "MKL_", "GLOO_", "NCCL_", "TORCH_", "PYTORCH_", "UCX_", "FI_")
_NAMES = {"CUDA_DEVICE_MAX_CONNECTIONS", "DS_ACCELERATOR", "GIGATOK_TRACEBACK", "HF_HOME", "HF_HUB_CACHE",
          "HF_HUB_OFFLINE", "LD_LIBRARY_PATH", "PYTHONPATH", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"}


def rank_variables(environment: Mapping[str, str], home: Path, working_dir: Path) -> dict[str, str]:
    """What ranks on other hosts are given: the user's `.deepspeed_env`, and what `environment` says beyond it.

    Both files are read, the one in working_dir last, as DeepSpeed does; DS_ENV_FILE may name another file. Raises
    InputError for a line that is not NAME=value.
    """
    name = environment.get(ENV_FILE_VARIABLE) or ENV_FILE
    variables: dict[str, str] = {}
    for path in dict.fromkeys((home / name, working_dir / name)):
        if path.is_file():
            variables |= _read(path)
    for variable, value in sorted(environment.items()):
        if variable not in variables and "\n" not in value and (
                variable in _NAMES or variable.startswith(_PREFIXES)):
            variables[variable] = escaped(value)
    return variables


def _read(path: Path) -> dict[str, str]:
    """NAME=value lines. Comments and empty lines are allowed here; DeepSpeed itself would stop at them."""
    variables = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, separator, value = line.partition("=")
        if not separator or not _NAME.fullmatch(name.strip()):
            raise InputError(f"{path} line {number}: {line!r} is not of the form NAME=value")
        variables[name.strip()] = value.strip()
    return variables


def escaped(value: str) -> str:
    """`value` so that a shell reads it back from inside double quotes."""
    return re.sub(r'([\\"$`])', r"\\\1", value)


def export_statements(variables: Mapping[str, str]) -> str:
    """The shell statements by which DeepSpeed sets these variables on another host."""
    return "".join(f'export {name}="{value}"; ' if _SPECIAL.search(value) else f"export {name}={value}; "
                   for name, value in variables.items())


def for_deepspeed(argument: str) -> str:
    """A command-line argument so that it arrives unchanged through DeepSpeed, pdsh and the remote shell.

    DeepSpeed puts an argument with a space into double quotes and escapes only the quotes in it; other arguments it
    leaves bare. pdsh replaces %h, %u and %n, and %% by %.
    """
    if " " in argument:
        argument = re.sub(r"([\\$`])", r"\\\1", argument)
    elif _SPECIAL.search(argument) or not argument:
        argument = "'" + argument.replace("'", "'\\''") + "'"
    return for_pdsh(argument)


def for_pdsh(text: str) -> str:
    """Text that pdsh passes on unchanged."""
    return text.replace("%", "%%")
