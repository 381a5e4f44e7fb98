"""The cells of the design, in the order in which partial results are most useful."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.learning.real.cells import Cell
from benchmarks.learning.real.own_runs import BASES, OURS
from benchmarks.learning.real.packed_peft import PEERS

MAJORITY, NO_PROMPT, HAND_WRITTEN = "always the majority answer", "no prompt", "best instruction"
SHOTS = "8 examples in context"
#: Not an arm: the cost of one step of this trainer.
STEP_PROFILE = "step profile"
#: Other arms start from the best instruction, so it is the first.
BASELINES = (HAND_WRITTEN, MAJORITY, NO_PROMPT, SHOTS)
#: Arms that are compared first.
DECISIVE_OURS = ("ours, prompt_tuning, system", "ours, prefix_tuning, system")
DECISIVE_PEERS = ("PEFT LoRA r8", "PEFT prompt tuning, text", "PEFT IA3")
#: Order of trying learning rates, by their rank: the middle one first.
RATE_ORDER = (2, 1, 3, 0, 4)


@dataclass(frozen=True)
class Reviews:
    """How much of a task's reviews is read.

    Attributes:
        words: reviews are cut after this number of words; 0: they are whole.
        validation_rows: number of rows on which arms are compared.
    """

    words: int
    validation_rows: int


#: The condition is named early in a review and has 8 values: differences show in 150 short rows.
#: The sentiment needs whole reviews, and all rows there are.
REVIEWS = {"condition": Reviews(48, 150), "sentiment": Reviews(0, 378)}


@dataclass(frozen=True)
class Design:
    """What is to be measured.

    Attributes:
        arms: names of the arms.
        rows: numbers of training rows; the first is that of the main comparison.
        num_rates: learning rates of a PEFT arm, from the middle outwards.
        reviews: by task.
    """

    arms: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[int, ...]
    steps: int
    tokens_per_step: int
    num_rates: int = 5
    reviews: Mapping[str, Reviews] = field(default_factory=lambda: REVIEWS)

    def cell(self, arm: str, task: str, rows: int, seed: int) -> Cell:
        size = self.reviews[task]
        return Cell(
            *(arm, task, rows, self.steps, self.tokens_per_step, size.validation_rows, size.words),
            seed=seed,
        )

    def rates(self, arm: str) -> list[float]:
        return [PEERS[arm].rates[i] for i in RATE_ORDER[: self.num_rates]]


@dataclass(frozen=True)
class Job:
    """Work to do next: cells of one run, or one cell of PEFT to train, or to validate.

    Attributes:
        validate: score a trained PEFT arm on the validation rows.
    """

    cells: tuple[Cell, ...]
    validate: bool = False


#: Number of training rows that a task has.
NumRows = Callable[[str], int]
#: Returns the best learning rate of a PEFT cell so far, or None.
BestRate = Callable[[Cell], float | None]


def jobs(design: Design, best_rate: BestRate, num_rows: NumRows) -> Iterator[Job]:
    """Yield all jobs of the design, done or not. Those at a best rate follow the other rates."""
    main, seed = design.rows[0], design.seeds[0]
    chosen = set(design.arms)
    ours = [arm for arm in OURS if arm in chosen and arm not in BASES]
    peers = [arm for arm in PEERS if arm in chosen]
    decisive_ours = [arm for arm in ours if arm in DECISIVE_OURS]
    decisive_peers = [arm for arm in DECISIVE_PEERS if arm in chosen]
    for task in design.tasks:
        yield from _baselines(design, task, main)
        yield from _bank(design, decisive_ours, task, main, seed)
        for arm in decisive_peers:
            yield from _all_rates(design, arm, task, main, best_rate)
    for task in design.tasks:
        for arm in BASES:
            if arm in chosen:
                yield from _bank(design, [arm], task, main, seed)
    for task in design.tasks:
        yield from _bank(design, [a for a in ours if a not in decisive_ours], task, main, seed)
    for seed in design.seeds[1:]:
        for task in design.tasks:
            yield from _bank(design, decisive_ours, task, main, seed)
            yield from _at_best(design, decisive_peers, task, main, seed, best_rate)
    for task in design.tasks:
        for arm in peers:
            if arm not in decisive_peers:
                yield from _all_rates(design, arm, task, main, best_rate)
    for rows in design.rows[1:]:
        for task in (task for task in design.tasks if rows <= num_rows(task)):
            yield from _baselines(design, task, rows)
            yield from _bank(design, ours, task, rows, design.seeds[0])
            yield from _at_best(design, peers, task, rows, design.seeds[0], best_rate)
    for seed in design.seeds[1:]:
        for task in design.tasks:
            yield from _bank(design, [a for a in ours if a not in decisive_ours], task, main, seed)
            others = [a for a in peers if a not in decisive_peers]
            yield from _at_best(design, others, task, main, seed, best_rate)


def _baselines(design: Design, task: str, rows: int) -> Iterator[Job]:
    for arm in BASELINES:
        if arm in design.arms:
            read = 0 if arm in (NO_PROMPT, HAND_WRITTEN) else rows  # these two need no rows
            yield Job((replace(design.cell(arm, task, read, 0), steps=0, tokens_per_step=0),))


def _bank(design: Design, arms: Sequence[str], task: str, rows: int, seed: int) -> Iterator[Job]:
    if arms:
        yield Job(tuple(design.cell(arm, task, rows, seed) for arm in arms))


def _all_rates(
    design: Design, arm: str, task: str, rows: int, best_rate: BestRate
) -> Iterator[Job]:
    cell = design.cell(arm, task, rows, design.seeds[0])
    for rate in design.rates(arm):
        yield Job((replace(cell, rate=rate),))
    yield Job((replace(cell, rate=best_rate(cell)),), validate=True)


def _at_best(
    design: Design, arms: Sequence[str], task: str, rows: int, seed: int, best_rate: BestRate
) -> Iterator[Job]:
    """Train at the best rate of the first number of rows and the first seed."""
    for arm in arms:
        main = design.cell(arm, task, design.rows[0], design.seeds[0])
        cell = replace(main, rows=rows, seed=seed, rate=best_rate(main))
        yield Job((cell,), validate=True)
