"""Which line of our code an operation belongs to: its own in a forward pass, that of its forward pass in a backward
one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
# Of our files those that only carry others' calls.
_CARRIERS = ("dry_run/", "planning/", "monitoring/meta_cache.py", "parallel/recompute.py")
# Code whose operations are named after it, whatever they are: file, and how the name of the class or function begins.
_CONTEXTS = (
    ("models/quantizer.py", "VectorQuantizer", "quantizer"),
    ("losses/perceptual.py", "", "frozen networks"),
    ("losses/feature_distance.py", "", "frozen networks"),
    ("losses/semantic.py", "Teacher", "frozen networks"),
    ("models/discriminators/dino.py", "DinoDiscriminator.activations", "frozen networks"),
)


class BlockCall:
    """One call of a compiled block, whose backward pass may follow."""

    def __init__(self, signature: Hashable):
        self.signature, self.returned = signature, False


class SourceLine(NamedTuple):
    """file:line in the package; context: the group that all of that code's operations belong to; norm: whether a norm's
    own code asked; block: the call of a compiled block within which it was (see meter.Meter.inside)."""

    source: str
    context: str | None
    norm: bool
    block: BlockCall | None
    backward: bool


class _Code(NamedTuple):
    file: str
    context: str | None
    norm: bool


class Sources:
    """Remembers where forward passes were, by autograd's numbers of their nodes."""

    def __init__(self):
        self._places: dict[int, SourceLine] = {}

    def here(self, block: BlockCall | None) -> SourceLine:
        """The source line of the operation being dispatched. block: the compiled block that runs forward, if any."""
        frame: FrameType | None = sys._getframe(1)
        source, context, norm, engine = None, None, False, False
        while frame is not None:
            code = _of(frame.f_code)
            if code is _ENGINE:
                engine = True
                break
            if code is not None:
                if source is None:
                    source, norm = f"{code.file}:{frame.f_lineno}", code.norm
                context = context or code.context
            frame = frame.f_back
        if not engine:
            place = SourceLine(source or "", context, norm, block, False)
            # Autograd has just made this operation's node; operations without one do not take its place.
            self._places.setdefault(torch.autograd._get_sequence_nr() - 1, place)
            return place
        node = torch._C._current_autograd_node()
        was = self._places.get(node._sequence_nr()) if node is not None else None
        was = was or SourceLine("", None, False, None, True)
        return SourceLine(source or was.source, context or was.context, norm if source else was.norm,
                          block or was.block, True)


_ENGINE = _Code("", None, False)


@functools.cache
def _of(code: CodeType) -> _Code | None:
    if code.co_name == "_engine_run_backward":
        return _ENGINE
    path = Path(code.co_filename)
    if not path.is_relative_to(_PACKAGE):
        return None
    file, name = path.relative_to(_PACKAGE).as_posix(), code.co_qualname
    if file.startswith(_CARRIERS):
        return None
    context = next((group for of, begins, group in _CONTEXTS if file == of and name.startswith(begins)), None)
    return _Code(file, context, "norm" in f"{Path(file).stem} {name}".lower())
