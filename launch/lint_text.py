"""Findings of ``promptshard lint`` and their effects, as lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import typer

from launch import settings_text
from launch.start import count
from trainer.evaluation.lint.results import CheckedText, Effect, FoundPart
from trainer.reporting.evaluation import format_difference, format_value
from trainer.runtime.redact import printable

#: Characters of the text that are shown on each side of a finding.
_AROUND = 30
_UNITS = {"loss": " nats per token", "perplexity": ""}


def lines(results: Sequence[CheckedText], width: int) -> Iterator[str]:
    """Yield the findings of all texts, each with its rewrite and, if measured, its effect."""
    for each in results:
        name = each.place if each.task is None else f"{each.place} ({each.task})"
        yield from settings_text.wrap(f"{name}: {printable(each.text.strip())!r}", width)
        for finding in each.findings:
            yield typer.style(f"  {finding.rule}", bold=True) + f"  {_shown(each.text, finding)}"
            why = f"{printable(finding.why)} {_advice(finding)}"
            yield from settings_text.wrap(why, width, 4)
        yield from ["  no findings"] * (not each.findings)
        if each.metric is not None:
            yield ""
            yield from _effects(each, each.metric, width)
        yield ""
    total = sum(len(each.findings) for each in results)
    yield f"{count(total, 'finding')} in {count(len(results), 'text')}"
    if any(each.metric is not None for each in results):
        yield from settings_text.wrap(
            "Effects: score after the rewrite minus score before, paired by row, with 95% "
            "interval; not corrected for the number of rewrites.",
            width,
        )


def _effects(each: CheckedText, metric: str, width: int) -> Iterator[str]:
    """Yield the score of a text, and how the rewrites of each rule change it."""
    yield (
        f"  {metric.replace('_', ' ')} {format_value(metric, each.score)} on "
        f"{count(each.rows or 0, 'validation row')}"
    )
    for rule, effect in each.rules.items():
        yield from settings_text.wrap(f"rule {rule}: {_effect(metric, effect)}", width, 4)
        parts = [finding for finding in each.findings if finding.rule == rule]
        if len(parts) > 1:
            for part in parts:
                text = _effect(metric, part.effect)
                yield from settings_text.wrap(f"{_short(each.text, part)}: {text}", width, 6)
    unready = dict.fromkeys(f.rule for f in each.findings if f.rule not in each.rules)
    for rule in unready:
        yield f"    rule {rule}: not measured; its rewrite is not ready to use"
    if each.rewritten is not None and len(each.rules) > 1:
        together = _effect(metric, each.rewritten_effect)
        yield from settings_text.wrap(f"all rewrites together: {together}", width, 4)
        yield from settings_text.wrap(f"{printable(each.rewritten.strip())!r}", width, 6)
    yield from settings_text.wrap(_detectable(each, metric), width, 2)


def _effect(metric: str, effect: Effect | None) -> str:
    """Return an effect as ``+2.1 points [0.3, 3.9]``."""
    if effect is None or effect.difference is None:
        return "not measured; a score is not finite"
    low, high = effect.low, effect.high
    unit = _UNITS.get(metric, " points")
    text = f"{format_difference(metric, effect.difference)}{unit}"
    if low is None or high is None:
        return text
    interval = f"[{format_difference(metric, low)}, {format_difference(metric, high)}]"
    if low <= 0 <= high:
        return f"no effect shown on this base: {text} {interval}"
    return f"{text} {interval}"


def _detectable(each: CheckedText, metric: str) -> str:
    """Say which effect these rows would show."""
    effects = [*each.rules.values(), each.rewritten_effect]
    least = [e.detectable_difference for e in effects if e and e.detectable_difference is not None]
    if not least:
        return "these rows are too few to show any effect"
    amount = format_difference(metric, max(least)).lstrip("+") + _UNITS.get(metric, " points")
    return f"these rows show an effect of {amount} or more with 80% power"


def _advice(finding: FoundPart) -> str:
    rewrite = printable(finding.rewrite.strip())
    if len(rewrite) < 2:
        return "Leave it out."
    return f"{'Add' if finding.start == finding.end else 'Rewrite'}: {rewrite!r}"


def _short(text: str, finding: FoundPart) -> str:
    """Return a part of a text, or its rewrite if it is empty, on one line."""
    part = printable(" ".join((text[finding.start : finding.end] or finding.rewrite).split()))
    return repr(part if len(part) <= 2 * _AROUND else f"{part[: 2 * _AROUND]}...")


def _shown(text: str, finding: FoundPart) -> str:
    """Return the part of a finding with some text around it, underlined on a terminal."""
    before, part, after = (
        printable(piece.replace("\n", " "))
        for piece in (text[: finding.start], text[finding.start : finding.end], text[finding.end :])
    )
    before = f"...{before[-_AROUND:]}" if len(before) > _AROUND else before
    after = f"{after[:_AROUND]}..." if len(after) > _AROUND else after
    if len(part) > 2 * _AROUND:
        before, part, after = "", f"{part[:_AROUND].strip()}...{part[-_AROUND:].strip()}", ""
    return before.lstrip() + typer.style(part, underline=True) + after.rstrip()
