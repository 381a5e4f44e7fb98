"""Records of all arms -> ``evaluation.json`` and the table of every task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.commands.evaluate.arm import Arm
from trainer.commands.evaluate.arms import SHIFTED
from trainer.commands.evaluate.costs import BaseCost, paid_after, query_cost, training_flops
from trainer.commands.evaluate.rows import halves
from trainer.evaluation.calibration import calibration
from trainer.evaluation.metric_sums import (
    LOWER_IS_BETTER,
    RowSums,
    paired_difference,
    row_sums,
    score_interval,
    unpaired_difference,
)
from trainer.evaluation.statistics import Difference
from trainer.reporting.evaluation import ArmResult, ChangeResult, TaskEvaluation
from trainer.reporting.summary import RunSummary

Records = Sequence[Mapping[str, Any]]


@dataclass
class TaskResults:
    """Compares the arms of a task.

    Attributes:
        records: of every arm, by name; one per row, in the same order.
    """

    arms: Sequence[Arm]
    records: Mapping[str, Records]
    metric: str
    select_on: str
    base: BaseCost
    summary: RunSummary | None

    def __post_init__(self) -> None:
        task = self.arms[0].rows.task
        self.sums = {a.name: row_sums(self.metric, task, self.records[a.name]) for a in self.arms}
        self.chosen_on, self.reported = self._halves()

    def evaluation(self) -> TaskEvaluation:
        best, text = self.best("prompt"), self.best("hand_written")
        samples = self.arms[0].samples
        costs = {arm.name: query_cost(arm, self.base) for arm in self.compared}
        training = training_flops(self.summary, self.base)
        differences = {arm.name: self._difference(arm, best) for arm in self.compared}
        arms = []
        for arm in self.compared:
            paid = None
            if best is not None and arm.kind not in ("prompt", "prompt_retrieved"):
                paid = paid_after(training, costs[best.name][1], costs[arm.name][1])
            arms.append(self._result(arm, differences[arm.name], costs[arm.name], paid))
        return TaskEvaluation(
            rows=len(self.reported),
            metric=self.metric,
            detectable_difference=self._detectable(best, differences),
            best=None if best is None else best.name,
            best_hand_written=None if text is None else text.name,
            selected_on=self.select_on,
            n_samples=None if samples is None else samples.count,
            temperature=None if samples is None else samples.temperature,
            arms=arms,
            robustness=[self._change(arm) for arm in self.arms if arm.change is not None],
        )

    def best(self, kind: str) -> Arm | None:
        """Return the arm of a kind with the best score on the rows to choose on.

        Of equal scores, that with the lowest loss is the best, as in training.
        """
        arms = [arm for arm in self.compared if arm.kind == kind]
        sign = 1 if self.metric in LOWER_IS_BETTER else -1

        def key(arm: Arm) -> tuple[bool, float, float]:
            score = self.sums[arm.name].at(self.chosen_on).score
            loss = self._loss(arm, self.chosen_on)
            return not math.isfinite(score), sign * score, math.inf if loss is None else loss

        return min(arms, key=key, default=None)

    @property
    def compared(self) -> list[Arm]:
        """The arms on the unchanged validation rows."""
        return [arm for arm in self.arms if arm.change is None]

    def reported_sums(self, arm: Arm) -> RowSums:
        return self.sums[arm.name].at(self.reported)

    def _halves(self) -> tuple[list[int], list[int]]:
        """Return the rows on which the best arms are chosen, and those that are reported."""
        rows = self.arms[0].rows
        everything = list(range(len(rows.candidates)))
        return (everything, everything) if self.select_on == "all" else halves(rows)

    def _difference(self, arm: Arm, best: Arm | None) -> Difference | None:
        if best is None or arm.name == best.name or len(self.reported) < 2:
            return None
        first, second = self.reported_sums(arm), self.reported_sums(best)
        if not (math.isfinite(first.score) and math.isfinite(second.score)):
            return None
        return paired_difference(self.metric, first, second)

    def _detectable(
        self, best: Arm | None, differences: Mapping[str, Difference | None]
    ) -> float | None:
        """Return the detectable difference to the best arm that is not a trained prompt."""
        sign = 1 if self.metric in LOWER_IS_BETTER else -1
        others = [
            (sign * self.reported_sums(arm).score, difference)
            for arm in self.compared
            if arm.kind not in ("prompt", "prompt_retrieved")
            and (difference := differences[arm.name]) is not None
        ]
        if best is None or not others:
            return None
        # 0 if all rows have the same difference, from which nothing can be estimated
        return finite(min(others, key=lambda item: item[0])[1].detectable_difference) or None

    def _result(
        self,
        arm: Arm,
        difference: Difference | None,
        cost: tuple[float, float],
        paid: float | None,
    ) -> ArmResult:
        sums = self.reported_sums(arm)
        low, high = score_interval(self.metric, sums)
        records = [self.records[arm.name][i] for i in self.reported]
        task = arm.rows.task
        calibrated = None
        if task.scored_by_likelihood:
            gold = [arm.rows.gold[i] for i in self.reported]
            calibrated = calibration(records, gold, task.choices or [])
        paired: dict[str, Any] = {}
        if difference is not None:
            paired = {
                "difference": finite(difference.difference),
                "difference_low": finite(difference.low),
                "difference_high": finite(difference.high),
                "p_value": finite(difference.p_value),
                "test": difference.test,
            }
        return ArmResult(
            name=arm.name,
            kind=arm.kind,
            text=arm.text,
            score=finite(sums.score),
            low=finite(low),
            high=finite(high),
            loss=self._loss(arm, self.reported),
            tokens_per_query=cost[0],
            flops_per_query=cost[1],
            bytes=arm.num_bytes,
            setup_seconds=arm.setup_seconds,
            training_seconds=self._training_seconds(arm),
            paid_after_queries=paid,
            **paired,
            **(calibrated or {}),
        )

    def _loss(self, arm: Arm, rows: Sequence[int]) -> float | None:
        """Mean loss of an arm on some rows; None if not all have a finite one."""
        records = [self.records[arm.name][i] for i in rows]
        if not all("loss" in record for record in records):
            return None
        return finite(row_sums("loss", arm.rows.task, records).score)

    def _change(self, arm: Arm) -> ChangeResult:
        """Compare an arm on shifted or changed rows with the same arm on the validation rows."""
        plain = self.reported_sums(self._unchanged(arm))
        if arm.change == SHIFTED:
            sums = self.sums[arm.name]
            difference = unpaired_difference(self.metric, sums, plain)
        else:
            sums = self.reported_sums(arm)
            difference = paired_difference(self.metric, sums, plain)
        low, high = score_interval(self.metric, sums)
        assert arm.change is not None
        return ChangeResult(
            arm=self._unchanged(arm).name,
            change=arm.change,
            rows=len(sums.values_RC),
            score=finite(sums.score),
            low=finite(low),
            high=finite(high),
            difference=finite(difference.difference),
            difference_low=finite(difference.low),
            difference_high=finite(difference.high),
            p_value=finite(difference.p_value),
        )

    def _unchanged(self, arm: Arm) -> Arm:
        name = arm.name.removesuffix(f"@{arm.change}")
        return next(other for other in self.compared if other.name == name)

    def _training_seconds(self, arm: Arm) -> float | None:
        """An equal share of the run's training time: its prompts are trained together."""
        if not arm.kind.startswith("prompt") or self.summary is None or not self.summary.prompts:
            return None
        seconds = self.summary.throughput.train_seconds
        return None if seconds is None else seconds / len(self.summary.prompts)


def finite(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON has not."""
    return value if math.isfinite(value) else None
