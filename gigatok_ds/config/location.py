"""Where data may lie, as a setting says it."""

from __future__ import annotations

import re

from gigatok_ds.errors import InputError

_USER = re.compile(r"(\w://)[^/\s@'\"]+@")
_QUERY = re.compile(r"(\w://[^\s?'\"]*)\?[^\s'\"]+")
_HEADER = re.compile(r"(?i)((?:authorization|x-[\w-]*(?:token|key)[\w-]*)\s*:\s*)[^'\"\n]+")


def is_remote(location: object) -> bool:
    """Whether a location is a URL or a command, and not a directory of this host. A Path never is."""
    return isinstance(location, str) and (location.startswith("pipe:") or "://" in location)


def masked(text: object) -> str:
    """A text without the secrets of the URLs and commands in it: users and passwords, queries, and headers that log in."""
    text = _USER.sub(r"\1***@", str(text))
    return _HEADER.sub(r"\1***", _QUERY.sub(r"\1?***", text))


def check_cache(cache: str | None, cache_gb: float | None, **locations: str | None) -> None:
    """Refuse a cache that would stay empty, and one without room. Locations that are not set yet may become remote."""
    if cache_gb is not None and cache_gb <= 0:
        raise InputError(f"data.cache_gb is {cache_gb}; it must be above 0")
    for name, value in (("cache", cache), ("cache_gb", cache_gb)):
        if value is not None and not any(place is None or is_remote(place) for place in locations.values()):
            raise InputError(f"data.{name} is {value}, but it does nothing where data lies in local directories; set "
                             f"it to null, or {' or '.join(f'data.{key}' for key in locations)} to a URL")
