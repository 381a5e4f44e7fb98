"""Measured figures with their targets, and a description of the machine."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from typing import Any

from trainer.runtime.process import read_text


def figure(name: str, value: float, reach: float | None) -> dict[str, Any]:
    """Return a figure for which less is better; ``reach`` is its target, None without one."""
    return {"figure": name, "value": round(value, 3), "reach": reach}


def figure_rows(figures: Sequence[dict[str, Any]]) -> list[str]:
    """Render figures as a Markdown table."""
    lines = ["| figure | measured | reach |", "|---|---|---|"]
    for row in figures:
        reach = "" if row["reach"] is None else f"<= {row['reach']}"
        lines.append(f"| {row['figure']} | {row['value']:.3f} | {reach} |")
    return lines


def machine() -> str:
    """Describe the CPU, its int8 instructions and cores, on which measured speeds depend."""
    cpu_info = read_text("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpu_info, flags=re.MULTILINE)
    fast = [name for name in ("amx_int8", "avx512_vnni", "avx_vnni") if f" {name}" in cpu_info]
    words = [model[1].strip() if model else platform.machine(), *fast[:1]]
    return f"{', '.join(words)}, {os.cpu_count()} cores, CPU only"
