"""Score arms in blocks of rows, and append the records of each block to the prediction files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.commands.evaluate.arm import Arm, Neighbors
from trainer.commands.evaluate.store import PredictionStore
from trainer.data.task_data import EvalSet
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.knn_prompting import nearest, read_anchors, votes
from trainer.evaluation.prediction_files import MAX_TEXTS
from trainer.evaluation.prediction_records import input_fields, scored_columns
from trainer.evaluation.scoring import Request
from trainer.model.weight_adapter import applied
from trainer.prompts.adapter_files import WeightAdapter
from trainer.prompts.soft_prompt import SoftPrompt

#: Rows of a block, per rank: the first block, and the largest. A stopped evaluation repeats at most
#: one block, so blocks grow only while they take less than ``BLOCK_SECONDS``.
FIRST_ROWS, MOST_ROWS = 8, 256
BLOCK_SECONDS = 10.0


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
        scored = [arm for arm in arms if arm.neighbors is None]
        for start, stop in self._blocks(max((len(arm.numbers) for arm in scored), default=0)):
            for adapter in sorted({-1 if a.adapter is None else a.adapter for a in scored}):
                due = [
                    (arm, range(max(start, done[arm.name]), min(stop, len(arm.numbers))))
                    for arm in scored
                    if (-1 if arm.adapter is None else arm.adapter) == adapter
                    and max(start, done[arm.name]) < min(stop, len(arm.numbers))
                ]
                if due:
                    self._score_block(due, advance, adapter)
        for arm in arms:
            if arm.neighbors is not None and done[arm.name] < len(arm.numbers):
                self._classify(arm, arm.neighbors, done[arm.name], advance)

    def num_texts(self, arms: Sequence[Arm], done: Mapping[str, int]) -> int:
        """Number of texts that ``score`` reads."""
        missing = [(arm, range(done[arm.name], len(arm.numbers))) for arm in arms]
        requests = [
            Request(arm.rows.subset(rows), arm.prompt, samples=arm.samples)
            for arm, rows in missing
            if rows and arm.neighbors is None
        ]
        anchors = [
            len(a.neighbors.inputs) + len(rows) for a, rows in missing if rows and a.neighbors
        ]
        return self.evaluator.num_texts(requests) + sum(anchors)

    def _classify(
        self, arm: Arm, neighbors: Neighbors, first: int, advance: Callable[[float], None]
    ) -> None:
        """Classify the rows of an arm by kNN prompting."""
        evaluator = self.evaluator
        started = time.perf_counter()
        anchors = read_anchors(evaluator, neighbors.inputs, neighbors.labels, advance)
        if self.store is not None:
            self.store.note(arm.task, arm.name, time.perf_counter() - started)
        for start, stop in self._blocks(len(arm.numbers), first):
            rows = arm.rows.subset(range(start, stop))
            nearest_R = nearest(
                evaluator,
                [row[0].input_ids[: row[0].last_target[0]] for row in rows.candidates],
                anchors,
                neighbors.excluded[start:stop],
                neighbors.count,
                advance,
            )
            if self.store is not None:
                columns = _neighbor_columns(rows, neighbors, nearest_R)
                self.store.append(arm.task, arm.name, records_of(arm, rows, start, columns))
        evaluator.engine.end_step()

    def _blocks(self, rows: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of blocks; all ranks yield the same."""
        engine, size = self.evaluator.engine, FIRST_ROWS
        while start < rows:
            # Of more rows, records would have no probabilities.
            stop = min(start + size * engine.world_size, start + MAX_TEXTS, rows)
            started = time.perf_counter()
            yield start, stop
            is_fast = time.perf_counter() - started < BLOCK_SECONDS
            if not engine.any_rank(not is_fast):
                size = min(2 * size, MOST_ROWS)
            start = stop

    def _score_block(
        self,
        due: Sequence[tuple[Arm, range]],
        advance: Callable[[float], None],
        adapter: int,
    ) -> None:
        requests = [
            Request(arm.rows.subset(rows), arm.prompt, samples=arm.samples) for arm, rows in due
        ]
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


def _neighbor_columns(
    rows: EvalSet, neighbors: Neighbors, nearest_R: Sequence[Sequence[int]]
) -> dict[str, Sequence[Any]]:
    """Fields of every row, as ``scored_columns``, with the places of its neighbors."""
    choices = rows.task.choices or []
    voted = [
        votes([neighbors.labels[anchor] for anchor in near], len(choices)) for near in nearest_R
    ]
    predicted = [choices[choice] for choice, _ in voted]
    target = [choices[choice] for choice in rows.gold]
    return {
        "target": target,
        "prediction": predicted,
        "correct": [a == b for a, b in zip(predicted, target, strict=True)],
        "probabilities": [dict(zip(choices, shares, strict=True)) for _, shares in voted],
        "neighbors": [[neighbors.places[anchor] for anchor in near] for near in nearest_R],
    }


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
        if arm.samples is not None:
            record["temperature"] = arm.samples.temperature
        yield record
