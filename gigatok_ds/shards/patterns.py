"""Names of many tars at once: `train-{000000..000146}.tar`, and several such, one after the other, between `::`."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from gigatok_ds.config.location import is_remote, masked
from gigatok_ds.errors import InputError
from gigatok_ds.file_kinds import is_tar

MOST = 1_000_000  # names that a location may stand for

_BETWEEN = re.compile(r"::(?=[\w+.-]+://|pipe:)|(?<=\.tar)::")
_INNERMOST = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_COUNTED = re.compile("\0(\\d+)\0")


def expanded(location: str) -> dict[str, str]:
    """URL, path or command by file name of a pattern of tars; nothing for a directory.

    Raises InputError for patterns that make no sense, or stand for more than MOST names.
    """
    parts = _BETWEEN.split(location)
    if len(parts) == 1 and not names_tars(location):
        return {}
    most = sum(_expansions(part) for part in parts)
    if most > MOST:
        raise InputError(f"{masked(location)} stands for {most:,} names; at most {MOST:,} are read")
    urls = [url for part in parts for url in _braces(part)]
    if all(url.startswith("pipe:") for url in urls):  # which of its words is a name, only the command knows
        return {f"shard-{number:06d}.tar": url for number, url in enumerate(urls)}
    named = {file_name(url): url for url in urls}
    for name in named:
        if not is_tar(name):
            raise InputError(f"{masked(location)} gives {name!r}; a pattern must end in .tar, in all it expands to")
    if len(named) < len(urls):
        raise InputError(f"{masked(location)} gives the same file name more than once; the names of shards must differ")
    return named


def names_tars(location: str) -> bool:
    """Whether a location says which tars it means, and not only a directory."""
    return location.startswith("pipe:") or "{" in location or is_tar(file_name(location))


def local_tars(location: str | Path) -> dict[str, Path]:
    """The paths, by file name, of a single tar of this host or a pattern of them; nothing for a directory.

    Raises InputError when one of them is not there, or they lie in several directories.
    """
    if os.path.isdir(location):
        return {}
    found = {name: Path(path) for name, path in expanded(str(location)).items()}
    for path in found.values():
        if not path.is_file():
            raise InputError(f"{location}: {path} does not exist or is not a file")
    folders = sorted({str(path.parent) for path in found.values()})
    if len(folders) > 1:
        raise InputError(f"{location} names tars in {folders[0]} and {folders[1]}; they must lie in one directory")
    return found


def file_name(url: str) -> str:
    """The last part of a URL or path, without what follows it in a URL."""
    return (urlsplit(url).path if is_remote(url) else url).rpartition("/")[2]


def _braces(pattern: str) -> list[str]:
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # its stub lacks the error

    try:
        return list(braceexpand(pattern, escape=False))
    except UnbalancedBracesError:
        raise InputError(f"{masked(pattern)} has a brace too many or too few; write it as in "
                         ".../train-{000000..000146}.tar") from None


def _expansions(pattern: str) -> int:
    """How many names a pattern stands for at most, counted before they are made, from the innermost braces outwards."""
    while match := _INNERMOST.search(pattern):
        pattern = f"{pattern[: match.start()]}\0{_alternatives(match[1])}\0{pattern[match.end() :]}"
    return _product(pattern)


def _alternatives(inside: str) -> int:
    if numbers := _NUMBERS.fullmatch(inside):
        first, last, step = int(numbers[1]), int(numbers[2]), abs(int(numbers[3] or 1)) or 1
        return abs(last - first) // step + 1
    if re.fullmatch(r"\w\.\.\w(\.\.-?\d+)?", inside):
        return abs(ord(inside[0]) - ord(inside[3])) + 1
    return sum(_product(choice) for choice in inside.split(","))


def _product(text: str) -> int:
    return math.prod(int(count) for count in _COUNTED.findall(text))
