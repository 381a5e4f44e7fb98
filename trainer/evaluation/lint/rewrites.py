"""Rewritten instructions, to be measured beside the original.

Every rewrite is applied alone, all rewrites of a rule together, and all rewrites of all rules
together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.evaluation.lint.finding import Finding
from trainer.evaluation.lint.text import tidy


@dataclass(frozen=True)
class Rewrites:
    """Texts of an instruction after rewrites; None or left out where no rewrite is ready to use.

    Attributes:
        by_finding: after the rewrite of each finding.
        by_rule: after all rewrites of a rule.
        together: after all rewrites.
    """

    original: str
    by_finding: tuple[str | None, ...]
    by_rule: dict[str, str]
    together: str | None

    @property
    def texts(self) -> list[str]:
        """All distinct texts, the original first."""
        changed = [text for text in self.by_finding if text is not None]
        last = [] if self.together is None else [self.together]
        return list(dict.fromkeys([self.original, *changed, *self.by_rule.values(), *last]))


def rewrites(text: str, findings: Sequence[Finding]) -> Rewrites:
    """Apply the rewrites of the findings in an instruction."""
    ready = [finding for finding in findings if finding.measurable]
    rules = dict.fromkeys(finding.rule for finding in ready)
    return Rewrites(
        text,
        tuple(finding.apply(text) if finding.measurable else None for finding in findings),
        {rule: apply_all(text, [f for f in ready if f.rule == rule]) for rule in rules},
        apply_all(text, ready) if ready else None,
    )


def apply_all(text: str, findings: Iterable[Finding]) -> str:
    """Apply several rewrites; of two that change the same part, only the one of the longer part."""
    kept: list[Finding] = []
    for finding in sorted(findings, key=lambda f: (f.start - f.end, f.start)):
        if not any(_overlap(finding, other) for other in kept):
            kept.append(finding)
    changed = text
    for finding in sorted(kept, key=lambda f: (f.start, f.end), reverse=True):
        changed = finding.replace(changed)
    end = text[len(text.rstrip()) :]
    return tidy(changed).rstrip() + end


def _overlap(first: Finding, second: Finding) -> bool:
    """Whether two findings share a character, or add text at the same place."""
    if first.start == first.end or second.start == second.end:
        return first.start == second.start and first.end == second.end
    return first.start < second.end and second.start < first.end
