"""Findings of ``promptshard lint`` and their measured effects, as in ``lint --json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from pydantic import BaseModel, ConfigDict

from trainer.evaluation.lint.finding import Finding
from trainer.evaluation.lint.instructions import Instruction


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class Effect(_Model):
    """Score of a rewritten instruction minus that of the original, paired by row.

    Attributes:
        low, high: 95% interval.
        detectable_difference: what this number of rows shows with 80% power.
        score: of the rewritten instruction.
    """

    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    detectable_difference: float | None
    score: float | None


class FoundPart(_Model):
    """A finding.

    Attributes:
        effect: of its rewrite; None if it is not measured.
    """

    rule: str
    start: int
    end: int
    why: str
    rewrite: str
    measurable: bool
    effect: Effect | None = None


class CheckedText(_Model):
    """An instruction with its findings.

    Attributes:
        place, task: as in ``Instruction``.
        metric, rows, score: of the original; None if nothing is measured.
        rules: effect of all rewrites of a rule together.
        rewritten: the text after all rewrites, and their effect.
    """

    place: str
    task: str | None
    text: str
    findings: list[FoundPart]
    metric: str | None = None
    rows: int | None = None
    score: float | None = None
    rules: dict[str, Effect] = {}
    rewritten: str | None = None
    rewritten_effect: Effect | None = None


class LintResults(_Model):
    """Content of the file of ``--json``."""

    prompts: list[CheckedText]


def unmeasured(instruction: Instruction, findings: Sequence[Finding]) -> CheckedText:
    """Return the findings of an instruction without effects."""
    return CheckedText(
        place=instruction.place,
        task=instruction.task,
        text=instruction.text,
        findings=[FoundPart(**asdict(finding)) for finding in findings],
    )
