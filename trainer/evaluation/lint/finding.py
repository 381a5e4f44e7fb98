"""Findings of a rule in an instruction, and the facts of its task."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.evaluation.lint.text import quotations, tidy


@dataclass(frozen=True)
class TaskWords:
    """What the rules need to know of the task whose instruction they read.

    Attributes:
        choices: class names; empty without ``choices``.
        template: text of the input template around the columns, read after the instruction.
        num_virtual_tokens: length of the prompt that starts from the instruction.
        token_ends: returns the index of the end of every token of a text.
    """

    choices: Sequence[str] = ()
    template: str = ""
    num_virtual_tokens: int | None = None
    token_ends: Callable[[str], Sequence[int]] | None = None


def protected(text: str, task: TaskWords) -> list[tuple[int, int]]:
    """Return the places of quotations and class names, whose wording is given."""
    names = [re.escape(choice) for choice in sorted(task.choices, key=len, reverse=True)]
    classes = re.finditer(rf"(?<!\w)(?:{'|'.join(names)})(?!\w)", text, re.IGNORECASE)
    return [*quotations(text), *(match.span() for match in classes if names)]


@dataclass(frozen=True)
class Finding:
    """A part of an instruction that breaks a rule.

    Attributes:
        start, end: the part, ``text[start:end]``; empty at the end of the text if something is
            missing.
        why: one sentence for the author.
        rewrite: text that replaces the part.
        measurable: whether the rewrite is ready to use, without a place to fill in.
    """

    rule: str
    start: int
    end: int
    why: str
    rewrite: str
    measurable: bool = True

    def replace(self, text: str) -> str:
        """Replace the part; what then begins its sentence gets a capital letter."""
        before, part, after = text[: self.start], text[self.start : self.end], text[self.end :]
        rest = self.rewrite + after
        begins = before.rstrip()[-1:] in {"", ".", "!", "?"} and part[:1].isupper()
        if begins and part.lower() != self.rewrite.lower():
            rest = rest[:1].upper() + rest[1:]
        return before + rest

    def apply(self, text: str) -> str:
        """Return the instruction with the rewrite."""
        changed = tidy(self.replace(text))
        return (
            changed
            if text[-1:] not in {"\n", " "}
            else changed.rstrip() + text[len(text.rstrip()) :]
        )
