"""Figures that are held against what they are to reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def figure(name: str, value: float, reach: float | None) -> dict[str, Any]:
    """A figure of which less is better; ``reach=None``: only told."""
    return {"figure": name, "value": round(value, 3), "reach": reach}


def figure_rows(figures: Sequence[dict[str, Any]]) -> list[str]:
    """They, as a table of Markdown."""
    lines = ["| figure | measured | reach |", "|---|---|---|"]
    for row in figures:
        reach = "" if row["reach"] is None else f"<= {row['reach']}"
        lines.append(f"| {row['figure']} | {row['value']:.3f} | {reach} |")
    return lines
