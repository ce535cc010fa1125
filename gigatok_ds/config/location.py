"""Where data may lie, as a setting says it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeGuard

from gigatok_ds.errors import InputError

_MASK = "***"
_USER = re.compile(r"(\w://)[^/\s@'\"]+@")
_QUERY = re.compile(r"(\w://[^\s?'\"]*)\?[^\s'\"]+")
_HEADER = re.compile(r"(?i)((?:authorization|x-[\w-]*(?:token|key)[\w-]*)\s*:\s*)[^'\"\n]+")
_OPTION = re.compile(r"((?:\s-u|--(?:proxy-)?user)[\s=]*['\"]?[^\s:'\"]+:)[^\s'\"]+")
_NAMED = re.compile(r"(?i)((?:passw(?:or)?d|token|secret(?:[\w-]*key)?)=['\"]?)[^\s'\"]+")


def is_remote(location: object) -> TypeGuard[str]:
    """Whether a location is a URL or a command, and not a directory of this host. A Path never is."""
    return isinstance(location, str) and (location.startswith("pipe:") or "://" in location)


def masked(text: object) -> str:
    """A text without the secrets of the URLs and commands in it: users and passwords, queries, headers that log in, and
    what is assigned to a password, token or secret key.
    """
    text = _USER.sub(rf"\1{_MASK}@", str(text))
    text = _QUERY.sub(rf"\1?{_MASK}", text)
    for pattern in (_HEADER, _OPTION, _NAMED):
        text = pattern.sub(rf"\1{_MASK}", text)
    return text


def is_masked(location: object) -> bool:
    """Whether a location is what `masked` made of one with secrets, so that nothing can be read there."""
    return is_remote(location) and _MASK in location


def check_cache(cache: str | None, cache_gb: float | None, **locations: Iterable[str]) -> None:
    """Refuse a cache that would stay empty, and one without room. Settings without a location yet may become remote."""
    if cache_gb is not None and cache_gb <= 0:
        raise InputError(f"data.cache_gb is {cache_gb}; it must be above 0")
    for name, value in (("cache", cache), ("cache_gb", cache_gb)):
        if value is not None and all(
                (places := list(given)) and not any(map(is_remote, places)) for given in locations.values()):
            raise InputError(f"data.{name} is {value}, but it does nothing where data lies in local directories; set "
                             f"it to null, or {' or '.join(f'data.{key}' for key in locations)} to a URL")
