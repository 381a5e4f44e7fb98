"""Metrics of ``promptshard evaluate``: which suit a task, and scores from prediction records.

Every metric is a function of sums over rows, so that rows can be resampled. Imports no torch.

Shape letters: R rows, C values of a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config import Task
from trainer.evaluation.bootstrap import bootstrap
from trainer.evaluation.pass_at_k import PASS_AT_K, k_of, pass_at_k
from trainer.evaluation.prediction_files import outcomes
from trainer.evaluation.statistics import (
    POWER_80,
    RATES,
    Difference,
    effective_rows,
    independent_difference,
    paired_fractions,
    paired_rates,
    wilson_interval,
)

Values = NDArray[np.float64]
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
#: Metrics of generated text, each with the package that computes it.
TEXT_METRICS = {"rouge_l": "rouge-score", "bleu": "sacrebleu", "chrf": "sacrebleu"}
#: Words of the longest sequences that BLEU counts.
BLEU_WORDS = 4
#: Words of ROUGE-L: those of rouge-score in ASCII text, and words in other scripts, which it drops.
#: Chinese and Japanese have no spaces: each character is a word.
_ROUGE_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W_\u3040-\u30ff\u3400-\u9fff]+")
#: Standard error of scores from 0 to 1 that differ only by rounding.
NO_SPREAD = 1e-9
#: All metrics except ``pass@k``, which is written with a number for k.
METRICS = (
    "accuracy",
    "macro_f1",
    "exact_match",
    "f1",
    "execution",
    *TEXT_METRICS,
    "loss",
    "perplexity",
)


@dataclass(frozen=True)
class RowSums:
    """A metric of some rows.

    Attributes:
        values_RC: contributions of every row.
        score_of: maps their sums [..., C] to scores [...].
    """

    values_RC: Values
    score_of: Callable[[Values], Values]

    @property
    def score(self) -> float:
        return float(self.score_of(self.values_RC.sum(0)))

    def scores_of(self, index: NDArray[np.int64]) -> Values:
        """Scores of resampled rows: ``index`` [..., R] -> [...]."""
        return self.score_of(self.values_RC[index].sum(-2))

    def at(self, rows: Sequence[int] | NDArray[np.int64]) -> RowSums:
        """Select rows by their indices."""
        return RowSums(self.values_RC[np.asarray(rows)], self.score_of)


def metric_problem(metric: str, task: Task) -> str | None:
    """Describe why a metric does not suit a task; None if it does."""
    if _suits(metric, task):
        return None
    needs = {
        "accuracy": "needs choices, with one label per row",
        "macro_f1": "needs choices, with one label per row",
        "f1": "compares sets of labels; it needs multi_label: true",
        "execution": "needs a task with metric: execution, whose rows have tests",
    }
    usable = [name for name in (*METRICS, PASS_AT_K) if _suits(name, task)]
    key = metric if k_of(metric) is None else "execution"
    if metric == "bleu" and task.choices:
        needs["bleu"] = f"counts sequences of up to {BLEU_WORDS} words, and no choice has as many"
    reason = needs.get(key, "compares generated text with a target text")
    return f"{metric} {reason}; use {', '.join(usable[:-1])} or {usable[-1]}"


def package_problem(metric: str) -> str | None:
    """Say how to install the package of a metric; None if nothing is missing."""
    from importlib.util import find_spec

    package = TEXT_METRICS.get(metric)
    if package is None or find_spec(package.replace("-", "_")) is not None:
        return None
    return f"{metric} needs the package {package}; run `pip install 'promptshard[metrics]'`"


def _suits(metric: str, task: Task) -> bool:
    if metric in ("accuracy", "macro_f1"):
        return task.scored_by_likelihood
    if metric == "f1":
        return task.multi_label
    if metric in ("execution", PASS_AT_K) or k_of(metric) is not None:
        return task.metric == "execution"
    if metric == "exact_match" or metric in TEXT_METRICS:
        has_text = task.tokens is None and bool(task.target or task.messages)
        if metric == "bleu" and task.choices and max(map(_num_words, task.choices)) < BLEU_WORDS:
            return False  # the score would be 0 for every answer
        is_free = not task.multi_label and task.metric != "execution"
        return has_text and (is_free or metric == "exact_match")
    return True


def _num_words(text: str) -> int:
    return len(text.split())


def scored_as(metric: str, task: Task) -> str:
    """Return the setting ``tasks.metric`` with which the evaluator makes the needed predictions."""
    if metric in ("exact_match", "f1", "execution"):
        return metric
    if k_of(metric) is not None:
        return "execution"
    if metric in TEXT_METRICS:
        return "exact_match"  # generates the text of every row
    return "accuracy" if task.scored_by_likelihood else "loss"


def row_sums(metric: str, task: Task, records: Sequence[Mapping[str, Any]]) -> RowSums:
    """Compute the contribution of every row to a metric; NaN where a record lacks a value."""
    if metric == "macro_f1":
        return _macro_f1(records, task.choices or [])
    if metric in TEXT_METRICS:
        texts = [(str(r.get("prediction", "")), str(r.get("target", ""))) for r in records]
        return _text_sums(metric, texts)
    if (k := k_of(metric)) is not None:
        passed = [record.get("passed") or [] for record in records]
        values = [pass_at_k(len(own), sum(own), k) if own else np.nan for own in passed]
        return RowSums(np.stack([np.asarray(values), np.ones(len(values))], axis=1), _ratio)
    terms = outcomes(records, "loss" if metric == "perplexity" else metric)
    if terms is None:
        return RowSums(np.full((len(records), 2), np.nan), _ratio)
    values_R2 = np.stack([np.asarray(terms.sums), np.asarray(terms.counts)], axis=1)
    score_of = _perplexity if metric == "perplexity" else _ratio
    return RowSums(values_R2, score_of)


def score_interval(metric: str, sums: RowSums) -> tuple[float, float]:
    """95% interval of a score: Wilson for rates and pass@k, else bootstrap over rows.

    If all rows are equally good, resampled rows do not differ; then it is Wilson's, too.
    """
    if metric in RATES:
        return wilson_interval(sums.score, len(sums.values_RC))
    if k_of(metric) is not None:
        return wilson_interval(sums.score, effective_rows(sums.values_RC[:, 0]))
    result = bootstrap(sums.scores_of, len(sums.values_RC))
    if result.standard_error < NO_SPREAD and metric not in LOWER_IS_BETTER:
        return wilson_interval(min(1.0, sums.score), len(sums.values_RC))
    return result.interval


def paired_difference(metric: str, first: RowSums, second: RowSums) -> Difference:
    """Compare two scores on the same rows.

    Exact McNemar test for rates, paired permutation test for pass@k, else paired bootstrap. If all
    rows have the same difference, resampled rows do not differ; then it is a permutation test, too.
    """
    if metric in RATES:
        return paired_rates(first.values_RC[:, 0] == 1, second.values_RC[:, 0] == 1)
    if k_of(metric) is not None:
        return paired_fractions(first.values_RC[:, 0], second.values_RC[:, 0])
    rows = len(first.values_RC)
    result = bootstrap(lambda index: first.scores_of(index) - second.scores_of(index), rows)
    if result.standard_error < NO_SPREAD and metric not in LOWER_IS_BETTER:
        return paired_fractions(np.full(rows, first.score), np.full(rows, second.score))
    return Difference(
        first.score - second.score,
        *result.interval,
        result.p_value,
        POWER_80 * result.standard_error,
        "paired bootstrap",
    )


def unpaired_difference(metric: str, first: RowSums, second: RowSums) -> Difference:
    """Compare two scores on different rows."""
    rows = (len(first.values_RC), len(second.values_RC)) if metric in RATES else None
    return independent_difference(
        (first.score, *score_interval(metric, first)),
        (second.score, *score_interval(metric, second)),
        rows,
    )


def _ratio(sums: Values) -> Values:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: Values = sums[..., 0] / sums[..., 1]
    return ratio


def _perplexity(sums: Values) -> Values:
    return np.exp(_ratio(sums))


def _macro_f1(records: Sequence[Mapping[str, Any]], choices: Sequence[str]) -> RowSums:
    """2 TP and 2 TP + FP + FN of every class, as scikit-learn's ``f1_score(average="macro")``."""
    known = np.asarray(choices)
    predicted = np.asarray([r["prediction"] for r in records])[:, None] == known
    gold = np.asarray([r["target"] for r in records])[:, None] == known
    values_RC = np.concatenate([2.0 * (predicted & gold), predicted * 1.0 + gold], axis=1)

    def score_of(sums: Values) -> Values:
        hits, counts = np.split(sums, 2, axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nanmean(hits / counts, axis=-1)  # classes that do not occur are left out

    return RowSums(values_RC, score_of)


def _text_sums(metric: str, texts: Sequence[tuple[str, str]]) -> RowSums:
    """ROUGE-L and chrF are means over rows; BLEU is that of the corpus. All are from 0 to 1."""
    if metric == "bleu":
        return _bleu(texts)
    if metric == "rouge_l":
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"], tokenizer=_RougeWords())
        values = [scorer.score(target, text)["rougeL"].fmeasure for text, target in texts]
    else:
        from sacrebleu.metrics import CHRF

        chrf = CHRF()
        values = [chrf.sentence_score(text, [target]).score / 100 for text, target in texts]
    return RowSums(np.stack([np.asarray(values), np.ones(len(values))], axis=1), _ratio)


class _RougeWords:
    """Tokenizer of ROUGE-L."""

    def tokenize(self, text: str) -> list[str]:
        words: list[str] = _ROUGE_WORD.findall(text.lower())
        return words


def _bleu(texts: Sequence[tuple[str, str]]) -> RowSums:
    """Smoothed as sacrebleu's ``corpus_bleu`` does by default."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, [target]) for text, target in texts]
    values_RC = np.asarray(
        [[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], dtype=float
    )

    def score(sums: Values) -> float:
        *counts, sys_len, ref_len = (int(value) for value in sums)
        order = len(counts) // 2
        result = BLEU.compute_bleu(
            counts[:order], counts[order:], sys_len, ref_len, smooth_method="exp"
        )
        return float(result.score / 100)

    return RowSums(values_RC, lambda sums: np.apply_along_axis(score, -1, sums))
