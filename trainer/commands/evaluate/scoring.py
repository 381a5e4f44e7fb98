"""Score arms in blocks of rows, and append the records of each block to the prediction files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.commands.evaluate.arms import Arm
from trainer.commands.evaluate.store import PredictionStore
from trainer.data.task_data import EvalSet
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.prediction_records import input_fields, scored_columns
from trainer.evaluation.scoring import Request
from trainer.model.weight_adapter import applied
from trainer.prompts.adapter_files import WeightAdapter
from trainer.prompts.soft_prompt import SoftPrompt

#: Rows of a block, per rank. A stopped evaluation repeats at most one block.
BLOCK_ROWS = 64


@dataclass
class ArmScorer:
    """Scores the arms of a task; all ranks call its methods together.

    Attributes:
        prompts: virtual tokens, or keys and values, by ``Arm.prompt``.
        adapters: LoRA and IA3 adapters with their tensors, by ``Arm.adapter``.
        store: on rank 0.
    """

    evaluator: Evaluator
    prompts: Sequence[SoftPrompt]
    adapters: Sequence[tuple[WeightAdapter, Mapping[str, Tensor]]]
    store: PredictionStore | None

    def score(
        self, arms: Sequence[Arm], done: Mapping[str, int], advance: Callable[[float], None]
    ) -> None:
        """Score all rows that have no record yet.

        Args:
            done: number of records of each arm.
            advance: called with the number of texts read since the last call.

        Raises:
            Stopped: on all ranks; the records of complete blocks are kept.
        """
        for start, stop in self._blocks(arms):
            for adapter in sorted({-1 if a.adapter is None else a.adapter for a in arms}):
                due = [
                    (arm, range(max(start, done[arm.name]), stop))
                    for arm in arms
                    if (-1 if arm.adapter is None else arm.adapter) == adapter
                    and done[arm.name] < stop
                ]
                if due:
                    self._score_block(due, advance, adapter)

    def num_texts(self, arms: Sequence[Arm], done: Mapping[str, int]) -> int:
        """Number of texts that ``score`` reads."""
        return self.evaluator.num_texts(
            [
                Request(a.rows.subset(range(done[a.name], len(a.rows.candidates))), a.prompt)
                for a in arms
                if done[a.name] < len(a.rows.candidates)
            ]
        )

    def _blocks(self, arms: Sequence[Arm]) -> Iterator[tuple[int, int]]:
        rows = max((len(arm.rows.candidates) for arm in arms), default=0)
        size = BLOCK_ROWS * self.evaluator.engine.world_size
        yield from ((start, min(start + size, rows)) for start in range(0, rows, size))

    def _score_block(
        self,
        due: Sequence[tuple[Arm, range]],
        advance: Callable[[float], None],
        adapter: int,
    ) -> None:
        requests = [Request(arm.rows.subset(rows), arm.prompt) for arm, rows in due]
        with self._adapted(adapter):
            results = self.evaluator.score(requests, self.prompts, advance)
        if self.store is None:
            return
        for (arm, rows), request, scored in zip(due, requests, results, strict=True):
            columns = scored_columns(request.rows, scored)
            records = records_of(arm, request.rows, rows.start, columns)
            self.store.append(arm.task, arm.name, records)

    def _adapted(self, index: int) -> AbstractContextManager[None]:
        if index < 0:
            return nullcontext()
        return applied(self.evaluator.base.model, *self.adapters[index])


def records_of(
    arm: Arm, rows: EvalSet, first: int, columns: Mapping[str, Sequence[Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the records of a block of rows.

    Args:
        first: index of the block's first row among the rows of the arm.
    """
    for i, number in enumerate(rows.row_numbers):
        record = {"row": arm.numbers[first + i] + 1} | input_fields(rows, number)
        record |= {key: values[i] for key, values in columns.items()}
        if arm.examples is not None:
            record["examples"] = list(arm.examples[first + i])
        yield record
