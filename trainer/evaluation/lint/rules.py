"""The rules of ``promptshard lint``.

Sources of the rules: the prompting guides of OpenAI, Anthropic and Google (one request, positive
instructions, a stated output format, concrete amounts); for the place of constraints, Liu and
others, Lost in the Middle (2307.03172).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from trainer.evaluation.lint.answers import class_names, no_output_format
from trainer.evaluation.lint.demands import (
    contradiction,
    double_negation,
    names_the_unwanted,
    negative_only,
)
from trainer.evaluation.lint.finding import Finding, TaskWords, protected
from trainer.evaluation.lint.structure import (
    buried_constraint,
    longer_than_prompt,
    split_requests,
    too_long,
)
from trainer.evaluation.lint.text import WORD, Sentence, sentences
from trainer.evaluation.lint.wording import filler, undefined_term, vague_amount

Rule = Callable[[str, list[Sentence], TaskWords], Iterator[Finding]]

#: The rules by name.
RULES: dict[str, Rule] = {
    "too-long": too_long,
    "split-requests": split_requests,
    "filler": filler,
    "vague-amount": vague_amount,
    "double-negation": double_negation,
    "negative-only": negative_only,
    "names-the-unwanted": names_the_unwanted,
    "buried-constraint": buried_constraint,
    "contradiction": contradiction,
    "undefined-term": undefined_term,
    "no-output-format": no_output_format,
    "class-names": class_names,
    "longer-than-prompt": longer_than_prompt,
}


#: Rules that also judge class names and quotations.
ABOUT_TASK = ("class-names", "no-output-format", "longer-than-prompt")


def lint(text: str, task: TaskWords | None = None) -> list[Finding]:
    """Return the findings of all rules, in the order of their places.

    Args:
        text: an instruction in words.
        task: what it is for; None: unknown.
    """
    task = task or TaskWords()
    if not WORD.search(text):
        return []
    parts, spared = sentences(text), protected(text, task)
    findings = [
        finding
        for rule in RULES.values()
        for finding in rule(text, parts, task)
        if finding.rule in ABOUT_TASK
        or not any(start <= finding.start and finding.end <= end for start, end in spared)
    ]
    return sorted(findings, key=lambda finding: (finding.start, finding.end, finding.rule))
