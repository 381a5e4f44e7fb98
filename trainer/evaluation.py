"""Scores of prompts on rows that are never trained on.

All prompts are scored in one packed pass: slots number every (prompt, row, candidate), ranks fill
in the losses of their own streams, and one all-reduce gives all ranks all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.base.model import PromptedBase
from trainer.engine import Engine
from trainer.generation import generate
from trainer.memory import StreamBudget
from trainer.prefetch import ahead, prepare_stream
from trainer.search import STANDARD_ERROR, ratio_standard_error
from trainer.tasks import metrics
from trainer.tasks.feed import EvalSet
from trainer.tasks.nested import split_labels
from trainer.tasks.rows import target_text
from trainer.tasks.streams import Piece, PromptLengths, Stream, plan_streams

#: Rows of so many streams of each rank are planned together, however many there are to score.
WINDOW_STREAMS = 64


@dataclass(frozen=True)
class Request:
    """Score one set of rows as one prompt reads them; ``prompt=None``: the base alone."""

    rows: EvalSet
    prompt: int | None


@dataclass
class Evaluator:
    """What scoring needs; the prompts come with each call."""

    engine: Engine
    base: PromptedBase
    tokenizer: PreTrainedTokenizerBase
    budget: StreamBudget

    @torch.no_grad()
    def score(
        self,
        requests: Sequence[Request],
        virtual_tokens: Sequence[Tensor],
    ) -> list[dict[str, float]]:
        """``loss``, its standard error and the task's metric, under its own name, per request."""
        slots = [len(request.rows.candidates) * _width(request) for request in requests]
        lengths = PromptLengths.of(virtual_tokens)
        nll = self._row_losses(requests, sum(slots), lengths, virtual_tokens)
        results = [
            self._result(request, part, virtual_tokens)
            for request, part in zip(requests, nll.split(slots), strict=True)
        ]
        self.engine.end_step()
        return results

    def _row_losses(
        self,
        requests: Sequence[Request],
        num_slots: int,
        lengths: PromptLengths,
        virtual_tokens: Sequence[Tensor],
    ) -> Tensor:
        """Summed negative log-likelihood of each slot's target, on every rank."""
        max_tokens = self.budget.tokens
        totals = torch.zeros(num_slots, dtype=torch.float64, device=self.engine.device)

        def streams() -> Iterator[list[Piece]]:
            most = WINDOW_STREAMS * max_tokens * self.engine.world_size
            for pieces in _windows(_pieces(requests), most):
                plan = plan_streams(pieces, lengths.tokens, self.engine.world_size, max_tokens)
                yield from plan[self.engine.rank]

        def make(pieces: list[Piece]) -> Stream:
            return prepare_stream(pieces, lengths, self.engine.device)

        for prepared in ahead(make, streams()):
            stream = prepared.to(self.engine.device)
            nll_N = self.base(stream, virtual_tokens).double()
            real = stream.label_slot_N >= 0
            totals.index_add_(0, stream.label_slot_N[real], nll_N[real])
        self.engine.all_reduce_sum([totals])
        return totals.cpu()

    def _result(
        self, request: Request, nll: Tensor, virtual_tokens: Sequence[Tensor]
    ) -> dict[str, float]:
        rows, task = request.rows, request.rows.task
        nll_RC = nll.view(-1, _width(request))
        right = torch.tensor(rows.gold)[:, None]
        nll_R, counts_R = nll_RC.gather(1, right)[:, 0].tolist(), rows.label_counts
        result = {
            "loss": sum(nll_R) / sum(counts_R),
            f"loss{STANDARD_ERROR}": ratio_standard_error(nll_R, counts_R),
        }
        if task.metric == "accuracy":
            result["accuracy"] = metrics.accuracy(nll_RC.argmin(1).tolist(), rows.gold)
        elif task.metric != "loss":
            prompt = None if request.prompt is None else virtual_tokens[request.prompt]
            result |= self._generated(rows, prompt)
        return result

    def _generated(self, rows: EvalSet, prompt: Tensor | None) -> dict[str, float]:
        """Metrics of what the base writes. Generated code is run by rank 0 alone.

        Of a dialogue it is the last answer.
        """
        examples = [candidates[0] for candidates in rows.candidates]
        inputs = [example.input_ids[: example.label_spans[-1][0]] for example in examples]
        texts = generate(
            self.engine, self.base, self.tokenizer, inputs, prompt, rows.task.max_new_tokens
        )
        values = [rows.rows[example.row] for example in examples]
        task = rows.task
        if task.metric == "execution":
            score = None
            if self.engine.is_main:
                passed = metrics.execution(texts, [value[task.tests] for value in values])
                score = sum(passed) / len(passed)
            return {"execution": self.engine.broadcast(score)}
        targets = [target_text(value, task) for value in values]
        if task.multi_label:
            written, right = ([split_labels(t, task) for t in found] for found in (texts, targets))
            scores = metrics.multi_label(written, right, task.choices or [])
            return scores if task.metric == "f1" else {"exact_match": scores["exact_match"]}
        return {"exact_match": metrics.exact_match(texts, targets)}


def _width(request: Request) -> int:
    """Candidates of each row."""
    return request.rows.candidates.width


def _pieces(requests: Sequence[Request]) -> Iterator[Piece]:
    """All candidates of all rows of all requests; slots are numbered in this order."""
    examples = (
        (example, request.prompt)
        for request in requests
        for candidates in request.rows.candidates
        for example in candidates
    )
    for slot, (example, prompt) in enumerate(examples):
        yield Piece(example, prompt, slot)


def _windows(pieces: Iterable[Piece], most: int) -> Iterator[list[Piece]]:
    """Pieces in portions of at most so many tokens, or one piece."""
    window: list[Piece] = []
    tokens = 0
    for piece in pieces:
        tokens += piece.example.num_tokens
        if window and tokens > most:
            yield window
            window, tokens = [], piece.example.num_tokens
        window.append(piece)
    if window:
        yield window
