"""``--prune``: drop virtual tokens whose removal does not hurt, and write the shorter adapters.

The tokens to drop are chosen on one half of the rows, and the shorter prompt is scored on the
other half, because a choice looks better than it is on the rows that it was made on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.commands.inspect_prompts.measurements import Measurements
from trainer.commands.inspect_prompts.subjects import Subject
from trainer.data.row_hashing import split_by_hash
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.inspection.leave_one_out import (
    largest_harmless,
    loss_change,
    nested_removals,
    without,
)
from trainer.evaluation.scoring import Request, Scored
from trainer.evaluation.statistics import Difference
from trainer.prompts.soft_prompt import SoftPrompt
from trainer.reporting.inspection import PrunedPrompt
from trainer.runtime.console import Console

#: Rows of a half. With fewer, intervals are so wide that removals that hurt do not show.
FEWEST_ROWS = 16


@dataclass(frozen=True)
class Pruned:
    """The result for the summary, and the shorter prompt; None if nothing is dropped."""

    result: PrunedPrompt
    values: SoftPrompt | None


def prune(
    evaluator: Evaluator,
    subjects: Sequence[Subject],
    measured: Sequence[Measurements],
    console: Console,
) -> list[Pruned | None]:
    """Choose and score the shorter prompts of all subjects in one pass; a collective.

    None for a subject that cannot be pruned; its notes get the reason.
    """
    halves = [_halves(subject) for subject in subjects]
    removals = [
        _removals(subject, results, chosen_on)
        for subject, results, (chosen_on, _) in zip(subjects, measured, halves, strict=True)
    ]
    bank: list[SoftPrompt] = []
    requests = []
    for subject, sets in zip(subjects, removals, strict=True):
        for dropped in sets:
            values = without(subject.values, dropped)
            assert values is not None, "one virtual token is kept"
            requests.append(Request(subject.rows, len(bank)))
            bank.append(values)
    scored: list[Scored] = []
    if requests:
        texts = evaluator.num_texts(requests)
        with console.phase("scoring shorter prompts", texts, "texts") as phase:
            scored = evaluator.score(requests, bank, phase.advance)
    results: list[Pruned | None] = []
    for subject, own, sets, parts in zip(subjects, measured, removals, halves, strict=True):
        shorter, scored = scored[: len(sets)], scored[len(sets) :]
        results.append(_result(subject, own, sets, shorter, *parts))
    return results


def _halves(subject: Subject) -> tuple[list[int], list[int]]:
    """Return the rows to choose on, and the rows to report."""
    rows = subject.rows
    hashes = rows.rows.hashes()[np.asarray(rows.row_numbers)]
    first, second = split_by_hash(hashes, 0.5)
    return first.tolist(), second.tolist()


def _removals(
    subject: Subject, measured: Measurements, chosen_on: Sequence[int]
) -> list[list[int]]:
    reported = len(subject.rows.candidates) - len(chosen_on)
    if min(len(chosen_on), reported) < FEWEST_ROWS:
        subject.notes.append(
            f"not pruned: {len(chosen_on)} and {reported} rows to choose on and to report are too "
            f"few; each half needs {FEWEST_ROWS}"
        )
        return []
    if not _is_finite(measured.scores[""]):
        subject.notes.append("not pruned: its loss is not finite")
        return []
    full, fixed = measured.scores[""], subject.num_fixed
    changes = [_change(subject, s, full, chosen_on) for s in measured.without[fixed:]]
    return [[fixed + i for i in dropped] for dropped in nested_removals(changes)]


def _change(subject: Subject, changed: Scored, full: Scored, rows: Sequence[int]) -> Difference:
    """Compare the losses of two prompts on some rows."""
    assert changed.nll_R is not None
    assert full.nll_R is not None
    counts_R = subject.rows.label_counts
    return loss_change(
        [changed.nll_R[i] for i in rows],
        [full.nll_R[i] for i in rows],
        [counts_R[i] for i in rows],
    )


def _result(
    subject: Subject,
    measured: Measurements,
    sets: Sequence[Sequence[int]],
    shorter: Sequence[Scored],
    chosen_on: Sequence[int],
    reported: Sequence[int],
) -> Pruned | None:
    full = measured.scores[""]
    if not _is_finite(full) or min(len(chosen_on), len(reported)) < FEWEST_ROWS:
        return None
    changes = [_change(subject, scores, full, chosen_on) for scores in shorter]
    removal = largest_harmless(sets, changes)
    after = shorter[len(removal.dropped) - 1] if removal.dropped else full
    change = _change(subject, after, full, reported)
    counts_R = subject.rows.label_counts
    tokens = sum(counts_R[i] for i in reported)
    assert full.nll_R is not None
    before = sum(full.nll_R[i] for i in reported) / tokens
    has_choices = subject.rows.task.scored_by_likelihood
    return Pruned(
        PrunedPrompt(
            dropped=list(removal.dropped),
            num_virtual_tokens=subject.values.num_virtual_tokens - len(removal.dropped),
            rows=len(reported),
            chosen_on=len(chosen_on),
            loss_before=before,
            loss=before + change.difference,
            difference=change.difference,
            difference_low=change.low,
            difference_high=change.high,
            metric="accuracy" if has_choices else None,
            score_before=_accuracy(subject, full, reported) if has_choices else None,
            score=_accuracy(subject, after, reported) if has_choices else None,
        ),
        without(subject.values, removal.dropped) if removal.dropped else None,
    )


def _accuracy(subject: Subject, scored: Scored, rows: Sequence[int]) -> float:
    predicted = scored.predicted
    return sum(predicted[i] == subject.rows.gold[i] for i in rows) / len(rows)


def _is_finite(scored: Scored) -> bool:
    return all(map(math.isfinite, scored.nll_R or []))
