"""Reading files that somebody else wrote: whatever a parser makes of them becomes an InputError of one line.

Sizes are bounded before anything of that size is made, and `printable` is what may be shown of a file's own words.
"""

from __future__ import annotations

import json
import math
import re
import tarfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gigatok_ds.errors import InputError

JSON_BYTES = 256 * 1024**2
_SHOWN = 160  # characters of what a parser says
_ESCAPED = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # controls, writing directions, halves of characters, new lines


def printable(value: object) -> str:
    """The text of a value in which nothing rules a terminal or hides: such characters are shown as escapes."""
    return "".join(character if unicodedata.category(character) not in _ESCAPED
                   else character.encode("unicode_escape", "surrogatepass").decode("ascii") for character in str(value))


def as_markdown(value: object) -> str:
    """The text of a value as text of a Markdown page: nothing in it is a tag, a link, a cell's end or a line's."""
    return re.sub(r"([\\|`*\[\]<>&])", _entity, printable(value))


def _entity(found: re.Match) -> str:
    return f"&#{ord(found[0])};"


def brief(error: BaseException | str) -> str:
    """What an exception says, in one short line."""
    text = printable(" ".join(str(error).split()))
    text = text or type(error).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@contextmanager
def reading(path: object, advice: str = "copy it again, or remove it") -> Iterator[None]:
    """Within, any exception but InputError and the operating system's own becomes an InputError about `path`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise
        raise InputError(f"{path} is damaged ({brief(error)}); {advice}") from None


def read_bytes(path: Path, most: int = JSON_BYTES) -> bytes:
    """All of a file. Raises InputError when it is none, or longer than `most` bytes."""
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise InputError(f"{path} is longer than the {most:,} bytes that such a file may have")
    return data


def parse_json(data: bytes, source: object, kind: type = dict, advice: str = "copy it again, or remove it"):
    """A JSON document, with or without a byte-order mark, whose outermost value is of `kind`."""
    with reading(source, advice):
        value = json.loads(data.decode("utf-8-sig"))
        if not isinstance(value, kind):
            raise ValueError(f"it holds a {type(value).__name__}, not a {kind.__name__}")
        return value


def read_json(path: Path, kind: type = dict, *, most: int = JSON_BYTES, advice: str = "copy it again, or remove it"):
    """The same of a file. Raises InputError when it is missing, too long, damaged or holds something else."""
    return parse_json(read_bytes(path, most), path, kind, advice)


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether a value is a finite number in a range, and not true or false."""
    if type(value) is int:
        return value.bit_length() < 1000 and low <= value <= high
    return type(value) is float and math.isfinite(value) and low <= value <= high


@contextmanager
def open_tar(**how) -> Iterator[tarfile.TarFile]:
    """tarfile.open, which reads the first header. Raises TarError, or OSError, for whatever it raises."""
    try:
        tar = tarfile.open(**how)  # noqa: SIM115 (closed below)
    except (tarfile.TarError, OSError):
        raise
    except Exception as error:
        raise tarfile.ReadError(brief(error)) from None
    with tar:
        yield tar


def members_in(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """The members of a tar of `size` bytes. Raises TarError for whatever a header makes tarfile raise, and for a member
    that does not lie between the one before and the end: tarfile would go back to it for ever."""
    end, members = 0, iter(tar)
    while True:
        try:
            member = next(members, None)
        except tarfile.TarError:
            raise
        except Exception as error:
            raise tarfile.ReadError(brief(error)) from None
        if member is None:
            return
        if member.size < 0 or member.offset < end or member.offset_data + member.size > size:
            raise tarfile.ReadError(
                f"{member.name!r} claims to be {member.size} bytes at byte {member.offset_data} of {size}"
            )
        end = member.offset_data + member.size
        yield member
