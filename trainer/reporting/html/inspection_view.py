"""Rows of the page's tables about virtual tokens and their controls, from ``inspection.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from trainer.reporting.inspection import (
    Control,
    PromptInspection,
    TokenInspection,
    losses_without,
)

NONE = "–"
#: Nearest tokens that are shown of every virtual token.
NEAREST = 3
#: Within a token and its cosine, so that lines break only between tokens.
NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class InspectionView:
    """Tables of one prompt.

    Attributes:
        titles, tokens: columns and rows, one per virtual token.
        controls: the prompt and its controls: name, elicited text, class rate, loss.
        steps: the same at each checkpoint.
        pruned: result of ``--prune`` in words.
    """

    name: str
    titles: Sequence[str]
    tokens: Sequence[Sequence[str]]
    controls: list[list[str]] = field(default_factory=list)
    steps: list[list[str]] = field(default_factory=list)
    pruned: str = ""
    notes: list[str] = field(default_factory=list)


def inspection_view(name: str, inspection: PromptInspection) -> InspectionView:
    """Format the inspection of a prompt; columns without any value are left out."""
    effects = losses_without(inspection.tokens)
    rows = [_token(token, effect) for token, effect in zip(inspection.tokens, effects, strict=True)]
    titles = [title for title in (rows[0] if rows else ()) if any(r[title] != NONE for r in rows)]
    controls = [("this prompt", inspection.elicited, inspection.class_rate, inspection.loss)]
    for kind in ("random", "initial", "other_task"):
        control: Control | None = getattr(inspection.controls, kind)
        if control is not None:
            label = f"control: {kind.replace('_', ' ')}"
            label += f" ({control.prompt})" if control.prompt else ""
            controls.append((label, control.elicited, control.class_rate, control.loss))
    return InspectionView(
        name=name,
        titles=titles,
        tokens=[[row[title] for title in titles] for row in rows],
        controls=[_elicited(*values) for values in controls],
        steps=[
            _elicited(f"step {each.step:,}", each.elicited, each.class_rate, each.loss)
            for each in inspection.checkpoints
        ],
        pruned=_pruned(inspection),
        notes=inspection.notes,
    )


def _token(token: TokenInspection, effect: str | None) -> dict[str, str]:
    nearest = [
        f"{each.token!r} {each.cosine:.2f}".replace(" ", NO_BREAK)
        for each in token.nearest[:NEAREST]
    ]
    attention = [share for share in token.attention or () if share is not None]
    same = "" if token.redundant_with is None else f" with {token.redundant_with}"
    return {
        "token": str(token.index),
        "nearest tokens, cosine": ", ".join(nearest) or NONE,
        "loss without it": effect or NONE,
        "attention": f"{fmean(attention):.1%}" if attention else NONE,
        "norm percentile": _number(token.norm_percentile, ".0f"),
        "key norm": _number(token.key_norm, ".2f"),
        "value norm": _number(token.value_norm, ".2f"),
        "drift": _number(token.drift, ".2f"),
        "redundancy": _number(token.redundancy, ".2f") + same,
        "gradient × input": _number(token.gradient_times_input, "+.1e"),
    }


def _elicited(name: str, text: str | None, rate: float | None, loss: float | None) -> list[str]:
    share = NONE if rate is None else f"{rate:.0%}"
    return [name, text or NONE, share, _number(loss, ".4f")]


def _pruned(inspection: PromptInspection) -> str:
    pruned = inspection.pruned
    if pruned is None:
        return ""
    if not pruned.dropped:
        return "No virtual token can be dropped without a loss."
    return (
        f"{len(pruned.dropped)} of {len(inspection.tokens)} virtual tokens were pruned: loss "
        f"{pruned.loss_before:.4f} before, {pruned.loss:.4f} after, difference "
        f"{pruned.difference:+z.4f} (95% interval {pruned.difference_low:+z.4f} to "
        f"{pruned.difference_high:+z.4f}) on {pruned.rows:,} other rows. {pruned.advice}"
    )


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)
