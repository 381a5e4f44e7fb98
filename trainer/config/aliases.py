"""Names that other trainers give to settings, from ``aliases.yaml``. Imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.config import yaml_parser


@dataclass(frozen=True)
class Alias:
    """Translation of another trainer's name.

    Attributes:
        setting: promptshard's name, or None if it has no such setting.
        see: the closest setting if there is no such setting; may be None.
        remedy: what to write instead, or why there is no such setting; may be empty.
    """

    setting: str | None
    see: str | None
    remedy: str

    @property
    def text(self) -> str:
        """The translation as a message."""
        if self.setting is None:
            return self.remedy
        return f"promptshard calls it {self.setting}" + (f"; {self.remedy}" if self.remedy else "")


@functools.cache
def all_aliases() -> Mapping[str, Alias]:
    """Return the translations by name; a name with a dot applies in that section only."""
    table = yaml_parser.parse(Path(__file__).with_name("aliases.yaml").read_text("utf-8")).data
    return {
        name: Alias(row.get("setting"), row.get("see"), row.get("remedy", ""))
        for row in table
        for name in row["names"].split()
    }


def find_alias(name: str) -> Alias | None:
    """Return the translation of a dotted name without list indices; None if it is not known."""
    section, _, leaf = name.lower().replace("-", "_").rpartition(".")
    known = all_aliases()
    return known.get(f"{section}.{leaf}") or known.get(leaf)
