"""Rules on the answer: how to give it, and the names of the classes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from trainer.evaluation.lint import words
from trainer.evaluation.lint.finding import Finding, TaskWords
from trainer.evaluation.lint.text import Sentence

#: More class names than this do not belong into an instruction.
MOST_CHOICES = 20


def no_output_format(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Choices exist, but nothing says how to answer."""
    complete = f"{text} {task.template}"
    if not task.choices or words.FORMAT.search(complete) or not _missing(complete, task.choices):
        return
    why = "does not say how to answer, though the task has choices."
    yield Finding("no-output-format", len(text), len(text), f"The text {why}", _demand(text, task))


def class_names(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Class names that are missing, or spelled in another way than the task spells them."""
    if not task.choices or len(task.choices) > MOST_CHOICES:
        return
    complete = f"{text} {task.template}"
    for choice in task.choices:
        exact = re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", complete)
        other = re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text, re.IGNORECASE)
        begins = other is not None and re.search(r"(?:^|[.!?:]\s+|\n)$", text[: other.start()])
        capital = begins and other is not None and other.group() == choice.capitalize()
        if exact is None and other is not None and not capital:
            why = f"{other.group()!r}: the task spells this class {choice!r}."
            yield Finding("class-names", other.start(), other.end(), why, choice)
    missing = _missing(complete, task.choices)
    if missing:
        names = ", ".join(missing)
        why = f"Class names are missing: {names}."
        yield Finding("class-names", len(text), len(text), why, _demand(text, task))


def _missing(text: str, choices: Sequence[str]) -> list[str]:
    if all(map(str.isdecimal, choices)):  # "from 1 to 5" names the numbers between
        for first, last in re.findall(r"(\d{1,4}) ?(?:to|-|–) ?(\d{1,4})", text):
            text += "".join(f" {number}" for number in range(int(first), int(last) + 1))
    return [
        c for c in choices if not re.search(rf"(?<!\w){re.escape(c)}(?!\w)", text, re.IGNORECASE)
    ]


def _demand(text: str, task: TaskWords) -> str:
    start = "" if text[-1:] in {" ", "\n"} else " "
    if len(task.choices) > MOST_CHOICES:
        return f"{start}Answer with the name of the class only."
    return f"{start}Answer with one of: {', '.join(task.choices)}."
