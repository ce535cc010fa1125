"""What the classes of a model are called: name i is that of label i in the data that it was trained on.

A run keeps them in `classes.json`, of which each checkpoint has a copy, and a standalone model in its config.json.
Where the training data has no names, nothing is written, and labels are taken by their numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gigatok_ds.errors import InputError
from gigatok_ds.files import write_atomically
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.plain import from_plain
from gigatok_ds.untrusted import brief, read_json

CLASSES_FILE = "classes.json"


class ClassNames(NamedTuple):
    """Names in the order of the labels, none where they are not known, and what has them, for messages."""

    names: Sequence[str] = ()
    source: str = ""


def classes_bytes(names: Sequence[str]) -> bytes:
    """The contents of a classes.json."""
    return (json.dumps(list(names), indent=0) + "\n").encode()


def read_classes(path: Path) -> list[str]:
    """What a classes.json says; nothing when there is none. Raises InputError when it is damaged."""
    if not path.is_file():
        return []
    try:
        names: list[str] = from_plain(list[str], read_json(path, list), path.name)
        return names
    except InputError as error:
        raise InputError(f"{path} is damaged ({brief(error)}); restore it from a checkpoint's copy") from None


def classes_of_run(run_dir: Path, topology: Topology, since: Path | None = None) -> ClassNames:
    """What a run's classes have been called so far, or those of the run in the directory `since` that it branches from.
    Collective."""
    places = [folder / CLASSES_FILE for folder in (run_dir, since) if folder]
    found = next((path for path in places if path.is_file()), None) if topology.is_first else None
    return ClassNames(*topology.from_first((read_classes(found), str(found)) if found else ((), "")))


def record_classes(names: Sequence[str], run_dir: Path, topology: Topology) -> None:
    """Write down what a run's classes are called, if they have names."""
    path = run_dir / CLASSES_FILE
    if names and topology.is_first and read_classes(path) != list(names):
        write_atomically(path, classes_bytes(names))


def class_numbers(words: Sequence[str], known: ClassNames) -> list[int]:
    """The labels that words stand for: whole numbers, or names. Raises InputError for a word that is neither, or two
    classes'.
    """
    numbers = {name: number for number, name in enumerate(known.names)}
    for word in words:
        if not word.isdecimal() and word not in numbers:
            there = (
                f"its classes are called {known.names[0]!r}, ..., {known.names[-1]!r}" if numbers else "it names none"
            )
            raise InputError(f"{known.source} has no class {word!r} ({there}); give class numbers, or its names, "
                             "separated by commas, e.g. 207,980")
        if not word.isdecimal() and list(known.names).count(word) > 1:
            raise InputError(
                f"{known.source} has two classes called {word!r}; give the number of the one that is meant"
            )
    return [int(word) if word.isdecimal() else numbers[word] for word in words]
