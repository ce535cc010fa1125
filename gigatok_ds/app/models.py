"""The models that the page shows: which of the given directories is which, loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from gigatok_ds.app.views import code_colours, neutral_codes
from gigatok_ds.checkpoint.standalone import CONFIG_FILE, check_same_codes, load_gpt, load_tokenizer, read_config
from gigatok_ds.errors import InputError
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.sampling.images import check_pair


@dataclass(frozen=True, kw_only=True)
class Models:
    """A tokenizer and perhaps the GPT of its codes; class_names has a name for each of the GPT's classes."""

    tokenizer: Tokenizer
    gpt: GPT | None = None
    class_names: Sequence[str] = ()

    @cached_property
    def neutral(self) -> np.ndarray:
        return neutral_codes(self.tokenizer)

    @cached_property
    def colours(self) -> np.ndarray:
        return code_colours(self.tokenizer)


def open_models(paths: Sequence[Path], *, device: str = "cpu", class_names: Path | None = None) -> Models:
    """Load the standalone models at `paths`; see `find_models`. class_names is a text file with one name a line;
    without it, classes are called what the GPT calls them.

    Raises InputError when they are not one tokenizer and at most one GPT of its codes, or names and classes differ in
    number.
    """
    found = find_models(paths)
    if "gpt" in found:
        check_same_codes(found["gpt"], found["tokenizer"], "give that one")
    tokenizer = load_tokenizer(found["tokenizer"], device=device)
    gpt = load_gpt(found["gpt"], device=device) if "gpt" in found else None
    if gpt is not None:
        check_pair(gpt, tokenizer)
    if class_names is not None and gpt is None:
        raise InputError(
            "--class-names belongs to a GPT, and there is none among the checkpoints; name its directory, too"
        )
    if class_names is None or gpt is None:
        names = _known_names(gpt)
    else:
        names = _read_names(class_names, gpt.config.num_classes)
    return Models(tokenizer=tokenizer, gpt=gpt, class_names=names)


def find_models(paths: Sequence[Path]) -> dict[str, Path]:
    """Directories by what they hold, "tokenizer" and perhaps "gpt".

    Each path is a standalone checkpoint or a directory with standalone checkpoints in it. Raises InputError unless they
    are, all together, one tokenizer and at most one GPT.
    """
    found: dict[str, Path] = {}
    for folder in dict.fromkeys(folder for path in paths for folder in _checkpoints(path)):
        kind = read_config(folder).get("kind")
        if kind not in ("tokenizer", "gpt"):
            raise InputError(f"{folder} holds a {kind}; the page shows a tokenizer and a gpt")
        if kind in found:
            raise InputError(f"there are two {kind}s, {found[kind]} and {folder}; name the directories of the models "
                             "themselves, one tokenizer and perhaps one gpt")
        found[kind] = folder
    if "tokenizer" not in found:
        raise InputError(f"there is no tokenizer in {', '.join(map(str, paths))}; name its directory, too: a gpt draws "
                         "codes, which it makes images of")
    return found


def _checkpoints(path: Path) -> list[Path]:
    if not path.is_dir():
        raise InputError(f"{path} is not a directory; give a standalone checkpoint, or a directory with some in it")
    if (path / CONFIG_FILE).is_file():
        return [path]
    folders = sorted(folder for folder in path.iterdir() if (folder / CONFIG_FILE).is_file())
    if not folders:
        raise InputError(f"{path} is no standalone checkpoint and holds none; `gigatok-ds convert` makes one of a run")
    return folders


def _known_names(gpt: GPT | None) -> list[str]:
    """What to show for each class of a GPT: its number and, if it has one, its name."""
    if gpt is None:
        return []
    named = [f"{label}: {name}" for label, name in enumerate(gpt.class_names)]
    return named + [str(label) for label in range(len(named), gpt.config.num_classes)]


def _read_names(path: Path, classes: int) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; give one class name a line") from None
    if len(names) != classes:
        raise InputError(
            f"{path} names {len(names)} classes, the GPT has {classes}; give one name a line, in their order"
        )
    return [f"{label}: {name}" for label, name in enumerate(names)]
