"""Data that lie in several places: a location, or a list of them with weights and names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gigatok_ds.config.location import is_remote, masked
from gigatok_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One of several places. Of training samples it gives the part `weight` / the sum of all weights; `name` is what
    figures and messages call it (null: the last part of its location).
    """

    location: str
    weight: float = 1.0
    name: str | None = None

    @property
    def called(self) -> str:
        return self.name or _last_part(self.location)


Locations = str | tuple[DataSource, ...] | None  # of a setting


def sources_of(value: Locations) -> tuple[DataSource, ...]:
    """All places of a setting."""
    if value is None:
        return ()
    return (DataSource(location=value),) if isinstance(value, str) else value


def locations_of(value: Locations) -> Iterator[str]:
    return (source.location for source in sources_of(value))


def masked_sources(value: Locations) -> Locations:
    """The same without the secrets of URLs and commands."""
    if isinstance(value, tuple):
        return tuple(replace(source, location=_masked(source.location)) for source in value)
    return value and _masked(value)


def _masked(location: str) -> str:
    return masked(location) if is_remote(location) else location


def check_sources_of(setting: str, value: Locations) -> None:
    """Raise InputError for a list of nothing, weights that are none, and two places of one name."""
    if isinstance(value, str) or value is None:
        return
    if not value:
        raise InputError(f"{setting} is an empty list; give a location, or a list of {{location: ..., weight: ...}}")
    for source in value:
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise InputError(f"{setting}: the weight of {masked(source.location)} is {source.weight}; it must be above "
                             "0 (leave out what is not to be read)")
    names = Counter(source.called for source in value)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise InputError(f"{setting}: {count} places are called {name!r}; give each a name of its own (name: ...)")
    if bad := next((name for name in names if not name or "/" in name or not name.isprintable()), None):
        raise InputError(f"{setting}: a place is called {bad!r}; a name has no slashes and is not empty")


def _last_part(location: str) -> str:
    text = masked(location).partition("?")[0].removeprefix("pipe:").rstrip("/")
    return (text.rpartition("/")[2] if "/" in text else text) or text
