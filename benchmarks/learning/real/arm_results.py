"""Results of an arm on a task over its seeds: means, intervals and paired differences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from benchmarks.learning.real.cells import Cell
from benchmarks.learning.real.laboratory import Laboratory
from benchmarks.learning.real.own_runs import OURS
from benchmarks.learning.real.packed_peft import PEERS
from benchmarks.learning.real.plan import BASELINES, HAND_WRITTEN, NO_PROMPT, Design
from trainer.evaluation.statistics import (
    Difference,
    normal_interval,
    paired_rates,
    paired_ratios,
    ratio_standard_error,
    wilson_interval,
)


@dataclass(frozen=True)
class ArmResult:
    """Results of an arm on a task: one per seed.

    Attributes:
        tried: learning rates of the first seed, for an arm of PEFT.
    """

    arm: str
    results: list[dict[str, Any]]
    seeds: tuple[int, ...]
    rate: float | None = None
    tried: tuple[float, ...] = ()

    @property
    def correct_R(self) -> list[float]:
        """Share of the seeds that answer a row correctly, for each validation row."""
        by_seed = [result["validation"]["correct"] for result in self.results]
        return [fmean(row) for row in zip(*by_seed, strict=True)]

    @property
    def accuracy(self) -> float:
        return fmean(self.correct_R)

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval over the validation rows; seeds are averaged."""
        correct_R = self.correct_R
        if len(self.results) == 1:
            return wilson_interval(self.accuracy, len(correct_R))
        error = ratio_standard_error(correct_R, [1] * len(correct_R))
        return normal_interval(self.accuracy, error)

    @property
    def loss(self) -> float | None:
        losses = [result["validation"].get("loss") for result in self.results]
        return None if None in losses else fmean(losses)

    @property
    def spread(self) -> float:
        """Difference between the best and the worst seed."""
        scores = [result["validation"]["accuracy"] for result in self.results]
        return float(max(scores) - min(scores))

    def mean(self, key: str) -> float | None:
        values = [result.get(key) for result in self.results]
        return None if None in values else fmean(values)

    def minus(self, other: ArmResult) -> Difference:
        """Difference of the accuracies, paired by row."""
        ours, theirs = self.correct_R, other.correct_R
        if len(self.results) == len(other.results) == 1:
            return paired_rates([bool(x) for x in ours], [bool(x) for x in theirs])
        ones = [1.0] * len(ours)
        return paired_ratios((ours, ones), (theirs, ones))


def arm_results(
    laboratory: Laboratory, design: Design, task: str, rows: int
) -> dict[str, ArmResult]:
    """Return the arms of a task that have a result on the validation rows."""
    by_arm = {}
    for arm in (*BASELINES, *OURS, *PEERS):
        seeds = (0,) if arm in BASELINES else design.seeds
        results, done, rate, tried = [], [], None, ()
        if arm in PEERS:
            main = design.cell(arm, task, design.rows[0], design.seeds[0])
            rate = laboratory.best_rate(main)
            tried = tuple(r for r in PEERS[arm].rates if laboratory.result(replace(main, rate=r)))
        for seed in seeds:
            result = laboratory.result(_cell(design, arm, task, rows, seed, rate))
            if result is not None and "validation" in result:
                results.append(result)
                done.append(seed)
        if results:
            by_arm[arm] = ArmResult(arm, results, tuple(done), rate, tried)
    return by_arm


def _cell(design: Design, arm: str, task: str, rows: int, seed: int, rate: float | None) -> Cell:
    if arm in BASELINES:
        read = 0 if arm in (NO_PROMPT, HAND_WRITTEN) else rows
        return replace(design.cell(arm, task, read, 0), steps=0, tokens_per_step=0)
    return replace(design.cell(arm, task, rows, seed), rate=rate)
