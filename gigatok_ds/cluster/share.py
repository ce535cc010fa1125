"""What one of several ranks, or readers, takes of what they share out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Share:
    """Part `rank` of `size` equal ones."""

    rank: int = 0
    size: int = 1


WHOLE = Share()
