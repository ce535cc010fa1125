"""Whether a call runs the native kernels: the library is loaded, or compiled, when first asked for."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gigatok_ds.cluster.launched import launched_rank_or_alone
from gigatok_ds.errors import InputError
from gigatok_ds.kernels import build

logger = logging.getLogger(__name__)

CHOICES = ("auto", "native", "torch")
LARGEST_DIM = 64  # of codes, for the native kernels
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


@dataclass(frozen=True, kw_only=True)
class Library:
    """The loaded library, or why there is none. devices: the types of device that it has kernels for."""

    path: Path | None = None
    devices: tuple[str, ...] = ()
    reason: str = ""


def kernels_for(*tensors: Tensor):
    """The namespace torch.ops.gigatok_native if these tensors' call should run there, else None.

    Raises InputError when GIGATOK_KERNELS forces the native kernels and there are none.
    """
    choice = kernels_choice()
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return None
    if tensors[0].ndim == 2 and tensors[0].shape[1] > LARGEST_DIM:
        if choice == "native":
            raise InputError(
                f"GIGATOK_KERNELS=native, but the codes have {tensors[0].shape[1]} dimensions and the native "
                f"kernels take at most {LARGEST_DIM}; set GIGATOK_KERNELS=auto"
            )
        return None
    return kernels_on(tensors[0].device.type)


def kernels_on(device: str):
    """The namespace torch.ops.gigatok_native if it has kernels for this type of device and may be used, else None.

    Raises InputError when GIGATOK_KERNELS forces the native kernels and there are none.
    """
    choice = kernels_choice()
    if choice == "torch":
        return None
    library = load()
    if device in library.devices:
        return torch.ops.gigatok_native
    if choice == "native":
        reason = library.reason or f"the library {library.path} was compiled without kernels for {device}"
        raise InputError(f"GIGATOK_KERNELS=native, but there are no native kernels: {reason}; "
                         "see gigatok-ds doctor, or set GIGATOK_KERNELS=auto")
    return None


def kernels_choice() -> str:
    """GIGATOK_KERNELS: auto (native if possible), native or torch."""
    choice = os.environ.get("GIGATOK_KERNELS") or "auto"
    if choice not in CHOICES:
        raise InputError(f"GIGATOK_KERNELS is {choice!r}; choose one of {', '.join(CHOICES)}")
    return choice


@functools.cache
def load() -> Library:
    """Load the library into this process, compiling it first where it is missing and can be compiled.

    Never raises: without it everything works, more slowly. Only what should have worked is worth a warning.
    """
    try:
        path = build.provide(logger.info)
        torch.ops.load_library(path)
    except build.Unavailable as error:
        return Library(reason=str(error))
    except (build.Failed, OSError) as error:
        if launched_rank_or_alone().is_first_of_host:
            logger.warning("the quantizer runs in plain PyTorch, without its native kernels; gigatok-ds doctor says "
                           "why")
        return Library(reason=str(error))
    devices = tuple(device for device, key in _KEYS.items()
                    if torch._C._dispatch_has_kernel_for_dispatch_key("gigatok_native::nearest_code", key))
    return Library(path=path, devices=devices)
