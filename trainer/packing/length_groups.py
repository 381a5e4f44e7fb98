"""Groups of similar length, which attention computes side by side. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

#: Shortest member of a group relative to its longest: less padding against fewer kernel calls.
LENGTH_RATIO = 0.7


def group_by_length(items: Iterable[T], length: Callable[[T], int]) -> list[list[T]]:
    """Group items of similar length, the longest first; items of equal length keep their order."""
    groups: list[list[T]] = []
    for item in sorted(items, key=lambda item: -length(item)):
        if groups and length(item) >= LENGTH_RATIO * length(groups[-1][0]):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups
