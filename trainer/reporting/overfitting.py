"""Describe whether a task's best prompt overfits, with the numbers that show it.

Train rows against validation rows, length against length, shifted rows, and the spread over seeds.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import variance

from trainer.config import LOWER_IS_BETTER, Prompt, RunConfig
from trainer.evaluation.prediction_files import train_file
from trainer.evaluation.score_format import (
    column_title,
    format_difference,
    format_score,
    is_loss,
    score_interval,
)
from trainer.evaluation.selection import best_and_other_length
from trainer.evaluation.statistics import (
    RATES,
    SIGNIFICANCE,
    Z95,
    Difference,
    independent_difference,
)
from trainer.reporting.comparison import paired_difference, score_of_file
from trainer.reporting.result_table import ResultRow, TaskTable
from trainer.reporting.summary import Change, Overfitting, SeedSpread, Selection, TrainScore

#: Settings in which prompts differ if they differ in their seeds only.
_SEEDS = frozenset({"name", "seed", "data_seed"})


def assess(
    output_dir: Path, config: RunConfig, table: TaskTable, selection: Selection | None
) -> Overfitting | None:
    """Measure the signs of overfitting of a task's best prompt; None if no prompt can be ranked.

    Args:
        table: with the comparison with the best baseline, if there is one.
    """
    compared = best_and_other_length(table.prompts, table.metric, table.num_rows.get("validation"))
    if compared is None or selection is None:
        return None
    best, other = compared
    baseline = table.best_baseline
    result = Overfitting(
        prompt=best.name,
        train=_train_score(output_dir, table, best),
        shift=_shift(table, best),
        baseline_shift=None if baseline is None else _shift(table, baseline),
        seeds=_seed_spread(config, table),
        take=_take(table, selection),
    )
    if other is not None:
        metric = result.train.metric if result.train else table.metric
        files = train_file(best.name), train_file(other.name)
        on_train = paired_difference(output_dir, *files, metric)
        length = paired_difference(output_dir, best.name, other.name, table.metric)
        result = result.model_copy(
            update={
                "other": other.name,
                "length": _change(length),
                "length_on_train": _change(on_train),
            }
        )
    within = selection.shorter is not None
    verdict = [text for text in _Sentences(table, result, best, other, within).all() if text]
    return result.model_copy(update={"verdict": verdict})


def _take(table: TaskTable, selection: Selection) -> str:
    """The best prompt, or a shorter one within one standard error.

    If prompts beat the best baseline significantly, it is one of these.
    """
    name = selection.shorter.prompt if selection.shorter else selection.prompt
    compared = table.comparison
    if compared is None:
        return name
    better = [*([compared.prompt] if compared.better else []), *compared.also_better]
    return name if name in better or not better else better[0]


def _train_score(output_dir: Path, table: TaskTable, row: ResultRow) -> TrainScore | None:
    for metric in dict.fromkeys((table.metric, "loss")):
        key, on_train = (
            f"validation_{metric}",
            score_of_file(output_dir, train_file(row.name), metric),
        )
        on_validation = score_interval(row.scores, key, table.num_rows)
        if on_train is None or on_train.interval is None or on_validation is None:
            continue
        rows = table.num_rows.get("validation", 0), on_train.rows
        gap = independent_difference(
            (row.scores[key], *on_validation),
            (on_train.score, *on_train.interval),
            rows if metric in RATES else None,
        )
        return TrainScore(metric=metric, rows=on_train.rows, score=on_train.score, gap=_change(gap))
    return None


def _shift(table: TaskTable, row: ResultRow) -> Change | None:
    """Score on the shifted validation rows minus that on the validation rows."""
    key, rows = f"validation_{table.metric}", table.num_rows
    shifted = score_interval(row.scores, f"shifted_{key}", rows)
    validation = score_interval(row.scores, key, rows)
    if shifted is None or validation is None:
        return None
    counts = rows.get("shifted_validation", 0), rows.get("validation", 0)
    return _change(
        independent_difference(
            (row.scores[f"shifted_{key}"], *shifted),
            (row.scores[key], *validation),
            counts if table.metric in RATES else None,
        )
    )


def _seed_spread(config: RunConfig, table: TaskTable) -> SeedSpread | None:
    """Spread of the group of prompts that has the best one and differs in seeds only."""
    groups: dict[str, list[ResultRow]] = defaultdict(list)
    settings = {prompt.name: _without_seeds(prompt) for prompt in config.prompts}
    for row in table.prompts:
        if row.ranked and not row.eliminated:
            groups[settings[row.name]].append(row)
    key = f"validation_{table.metric}"
    scores = {rows[0].name: [row.scores[key] for row in rows] for rows in groups.values()}
    several = {name: values for name, values in scores.items() if len(values) > 1}
    if not several:
        return None
    name, best = next(iter(several.items()))  # prompts, and so groups, are in order of rank
    squares = sum((len(values) - 1) * variance(values) for values in several.values())
    freedom = sum(len(values) - 1 for values in several.values())
    return SeedSpread(
        prompt=name,
        seeds=len(best),
        low=min(best),
        high=max(best),
        standard_deviation=math.sqrt(squares / freedom),
    )


def _without_seeds(prompt: Prompt) -> str:
    return json.dumps(prompt.model_dump(mode="json", exclude=set(_SEEDS)), sort_keys=True)


def _change(difference: Difference | None) -> Change | None:
    if difference is None:
        return None
    fields = ("difference", "low", "high", "p_value", "test")
    return Change(**{field: getattr(difference, field) for field in fields})


@dataclass(frozen=True)
class _Sentences:
    """The verdict, sentence by sentence.

    Attributes:
        within: whether ``other`` is a shorter prompt within one standard error of ``best``.
    """

    table: TaskTable
    result: Overfitting
    best: ResultRow
    other: ResultRow | None
    within: bool

    def all(self) -> list[str]:
        return [self.length(), self.train(), self.shift(), self.seeds()]

    def length(self) -> str:
        """How the longer and the shorter of two prompts fit train rows and validation rows."""
        result, other = self.result, self.other
        if other is None or result.length is None:
            return ""
        longer, shorter = self.best, other
        if other.num_virtual_tokens > self.best.num_virtual_tokens:
            longer, shorter = other, self.best
        sign = 1 if longer is self.best else -1
        long, short = (f"{row.num_virtual_tokens} ({row.name})" for row in (longer, shorter))
        text = f"{long.replace(' (', ' virtual tokens (', 1)}"
        if result.length_on_train is not None and result.train is not None:
            fit = _Difference(result.length_on_train, result.train.metric, sign)
            verb = {1: "fit the train rows better than", -1: "fit the train rows worse than"}
            claim = verb.get(fit.better, f"fit {result.train.rows:,} train rows no better than")
            text += f" {claim} {short}: {fit}. On the validation rows they are"
            against = ""
        else:
            text, against = f"{text} are", f" than {short} on the validation rows"
        new = _Difference(result.length, self.table.metric, sign)
        claim = {1: "better", -1: "worse"}.get(new.better, "not significantly better")
        text += f" {claim}{against}: {new}."
        advised = next((row for row in (self.best, other) if row.name == result.take), None)
        if advised is None:
            return text
        reason = ""
        if not new.better and advised is longer:
            reason = f": the shorter one {self._reason(shorter)}"
        return f"{text} Of these two, take {advised.num_virtual_tokens} ({advised.name}){reason}."

    def _reason(self, shorter: ResultRow) -> str:
        """Why a shorter prompt that is not significantly worse is not taken."""
        if self.within:
            return "is not significantly better than the best baseline"
        if shorter.eliminated:
            return "was eliminated by halving"
        return "is worse by more than one standard error"

    def train(self) -> str:
        train = self.result.train
        if train is None or train.gap is None:
            return ""
        key = f"validation_{train.metric}"
        gap = _Difference(train.gap, train.metric)
        text = (
            f"{self.best.name} has {self._name(train.metric)} "
            f"{format_score(key, self.best.scores[key])} on validation rows and "
            f"{format_score(key, train.score)} on {train.rows:,} train rows, difference {gap}: "
        )
        if gap.better < 0:
            return text + (
                "it fits its train rows better than new rows. More train rows, fewer steps or "
                "fewer virtual tokens can help."
            )
        return text + "no significant overfitting to the train rows."

    def shift(self) -> str:
        if self.result.shift is None:
            return ""
        shift = _Difference(self.result.shift, self.table.metric)
        shifted = self.best.scores[f"shifted_{shift.key}"]
        claims = {1: "significantly better", -1: "significantly worse"}
        text = (
            f"On the OOD validation rows it has {self._name(self.table.metric)} "
            f"{format_score(shift.key, shifted)}, difference {shift}: "
            f"{claims.get(shift.better, 'no significant change')}"
        )
        baseline, row = self.result.baseline_shift, self.table.best_baseline
        if baseline is not None and row is not None:
            of_baseline = _Difference(baseline, self.table.metric)
            text += f"; the best baseline there: {of_baseline.value}"
        return text + "."

    def seeds(self) -> str:
        spread, key = self.result.seeds, f"validation_{self.table.metric}"
        if spread is None:
            return ""
        if spread.standard_deviation == 0:
            same = format_score(key, spread.low)
            return f"All {spread.seeds} seeds of {spread.prompt} score {same}."
        ends = " to ".join(format_score(key, value) for value in (spread.low, spread.high))
        # Standard deviation of the difference of two runs (ISO 5725-6, 4.1: repeatability limit)
        error = math.sqrt(2) * spread.standard_deviation
        change = format_difference(key, Z95 * error).lstrip("+")
        return (
            f"{spread.seeds} seeds of {spread.prompt} score {ends}: with another seed, a score can "
            f"change by about {change}{_unit(key)}."
        )

    def _name(self, metric: str) -> str:
        same = metric == self.table.metric
        return column_title(self.table.column(self.best) if same else f"validation_{metric}")


@dataclass(frozen=True)
class _Difference:
    """A difference as text, with the sign of the longer prompt's view if ``sign`` is -1."""

    change: Change
    metric: str
    sign: int = 1

    @property
    def key(self) -> str:
        return f"validation_{self.metric}"

    @property
    def better(self) -> int:
        """1: significantly better; -1: significantly worse; else 0."""
        if self.change.p_value >= SIGNIFICANCE:
            return 0
        lower_is_better = self.metric in LOWER_IS_BETTER
        return 1 if (self.sign * self.change.difference > 0) != lower_is_better else -1

    @property
    def value(self) -> str:
        value = format_difference(self.key, self.sign * self.change.difference)
        return f"{value}{_unit(self.key)}"

    def __str__(self) -> str:
        ends = sorted((self.sign * self.change.low, self.sign * self.change.high))
        low, high = (format_difference(self.key, end) for end in ends)
        return f"{self.value} (95% interval {low} to {high})"


def _unit(key: str) -> str:
    return "" if is_loss(key) else " points"
