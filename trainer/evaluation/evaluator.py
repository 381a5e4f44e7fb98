"""Scores of prompts on rows that are never trained on.

All prompts are scored in one packed pass: slots number every (prompt, row, candidate), ranks fill
in the losses of their own packed batches, and one all-reduce gives all ranks all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.data.column_parsers import split_labels
from trainer.data.label_prefixes import exclusive
from trainer.data.task_data import EvalSet
from trainer.data.teacher import Teacher
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.prefetch import prefetched, prepare_batch
from trainer.evaluation import metrics
from trainer.evaluation.baseline_cache import BaselineCache
from trainer.evaluation.generation import StopCriteria, generate
from trainer.evaluation.statistics import STANDARD_ERROR, macro_f1, ratio_standard_error
from trainer.model.prompted_model import PromptedBase, read_teacher
from trainer.packing.activation_memory import TokenBudget
from trainer.packing.packed_batch import PackedBatch, PackedRow, PromptLengths
from trainer.packing.planning import plan_batches, portions
from trainer.runtime import stop_signals
from trainer.runtime.stop_signals import Stopped

#: Rows of so many packed batches of each rank are planned together, however many there are to
#: score.
WINDOW_BATCHES = 64
#: Tokens of a batch of generation, in packed batches: it keeps nothing but keys and values.
WRITTEN_TOKENS = 4


@dataclass(frozen=True)
class Request:
    """Score one set of rows as one prompt reads them; ``prompt=None``: the base alone.

    Attributes:
        teacher: whose distributions the prompt is compared with.
    """

    rows: EvalSet
    prompt: int | None
    teacher: Teacher | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether labels are scored without a trained prompt: the result follows from the rows."""
        return self.by_labels and self.prompt is None

    @property
    def by_labels(self) -> bool:
        """Whether the likelihood of labels is asked for; it says nothing that a teacher learns."""
        return self.teacher is None or self.rows.task.metric != "loss"


@dataclass(frozen=True)
class Scored:
    """Result of one request, the same on every rank.

    Attributes:
        scores: metrics by name.
        nll_RC: negative log-likelihood of every candidate of every row, in nats, float64, on the
            CPU; rows and candidates as in ``EvalSet.candidates``. The predicted choice of a row is
            the candidate with the lowest value. A choice that begins another one counts without
            text that continues as the longer one (``trainer.data.label_prefixes``); the loss counts
            all of it. None where labels are not scored.
        nll_R: negative log-likelihood of every row's right target, as the loss sums it.
        texts_R: generated text of every row; None where nothing is generated.
        targets_R: text of every row's target, decoded as the generated text is.
        correct_R: whether the generated text of a row is right by the task's metric; of sets of
            labels, whether the whole set is.
        teacher_R2: divergence from the teacher in nats and number of positions with the same most
            likely token, both summed over the labels of every row; None without a teacher.
    """

    scores: dict[str, float]
    nll_RC: Tensor | None = None
    nll_R: list[float] | None = None
    texts_R: list[str] | None = None
    targets_R: list[str] | None = None
    correct_R: list[bool] | None = None
    teacher_R2: Tensor | None = None

    @property
    def predicted(self) -> list[int]:
        """Index of the most likely candidate of each row."""
        assert self.nll_RC is not None, "labels are not scored"
        predicted: list[int] = self.nll_RC.argmin(1).tolist()
        return predicted


@dataclass
class Evaluator:
    """What scoring needs; the prompts come with each call.

    Attributes:
        teachers: word embeddings of the teachers' texts, by ``Teacher.index``.
        baselines: likelihoods under the base alone that earlier runs have computed.
        reused: requests whose likelihoods were found there.
    """

    engine: Engine
    base: PromptedBase
    tokenizer: PreTrainedTokenizerBase
    budget: TokenBudget
    teachers: Sequence[Tensor] = ()
    baselines: BaselineCache | None = None
    reused: int = 0

    def __post_init__(self) -> None:
        self._advance: Callable[[float], None] = lambda texts: None

    @torch.no_grad()
    def score(
        self,
        requests: Sequence[Request],
        virtual_tokens: Sequence[Tensor],
        advance: Callable[[float], None] = lambda texts: None,
    ) -> list[Scored]:
        """Score every request: ``loss``, its standard error and the task's metric by its name.

        With a teacher the loss is the mean divergence from it, in nats a position, and
        ``agreement`` is the share of positions where both have the same most likely token.

        Args:
            advance: called with the number of texts that were just read, of ``num_texts``.

        Raises:
            Stopped: on all ranks, between two packed batches or two batches of generation, if one
                of them received a stop signal.
        """
        self._advance = advance
        lengths = PromptLengths.of(virtual_tokens)
        known = self._known(requests)
        asked = [r for r, found in zip(requests, known, strict=True) if found is None]
        slots = [_num_slots(request) for request in asked]
        scored = iter(self._row_losses(asked, sum(slots), lengths, virtual_tokens).split(slots))
        nll = [next(scored) if found is None else found for found in known]
        for request, part, found in zip(requests, nll, known, strict=True):
            if found is None and request.is_baseline:
                self._keep(request, part)
        results = [
            self._result(request, part, virtual_tokens)
            for request, part in zip(requests, nll, strict=True)
        ]
        if any(request.teacher is not None for request in requests):
            compared = self._comparisons(requests, lengths, virtual_tokens)
            results = [
                result
                if teacher_R2 is None
                else replace(
                    result,
                    scores=result.scores | _compared(teacher_R2, request.rows.label_counts),
                    teacher_R2=teacher_R2,
                )
                for request, result, teacher_R2 in zip(requests, results, compared, strict=True)
            ]
        self.engine.end_step()
        return results

    def num_texts(self, requests: Sequence[Request]) -> int:
        """Texts that ``score`` reads: rows (candidates where rows are padded) and generations."""
        texts = 0
        for request in requests:
            rows = len(request.rows.candidates)
            if request.by_labels:
                texts += self._num_read(request)
                texts += 0 if request.rows.task.scored_by_likelihood else rows
            if request.teacher is not None:
                texts += rows
        return texts

    def _num_read(self, request: Request) -> int:
        """Texts that scoring by labels reads."""
        rows = len(request.rows.candidates)
        return rows if self.base.packed else rows * _width(request)

    def _known(self, requests: Sequence[Request]) -> list[Tensor | None]:
        """Likelihoods that an earlier run has computed, on every rank; None for the others."""
        if self.baselines is None or not any(request.is_baseline for request in requests):
            return [None] * len(requests)
        found = None
        if self.engine.is_main:
            found = [
                self.baselines.read(request.rows.candidates) if request.is_baseline else None
                for request in requests
            ]
        known = self.engine.broadcast(found)
        assert known is not None
        for request, nll in zip(requests, known, strict=True):
            if nll is not None:
                self.reused += 1
                self._advance(self._num_read(request))
        return [None if nll is None else torch.from_numpy(nll).flatten() for nll in known]

    def _keep(self, request: Request, nll: Tensor) -> None:
        if self.baselines is not None and self.engine.is_main:
            nll_RC = nll.view(-1, _width(request)).numpy()
            self.baselines.write(request.rows.candidates, nll_RC)

    def _row_losses(
        self,
        requests: Sequence[Request],
        num_slots: int,
        lengths: PromptLengths,
        virtual_tokens: Sequence[Tensor],
    ) -> Tensor:
        """Summed negative log-likelihood of each slot's target, on every rank."""
        totals = torch.zeros(num_slots, dtype=torch.float64, device=self.engine.device)
        packed_rows = _packed_rows(requests, self.base.packed, self.budget.tokens)
        for batch in self._batches(packed_rows, lengths):
            nll_N = self.base(batch, virtual_tokens).double()
            slot_N = batch.label_slot_N  # -1 in a padding row, whose losses count nothing
            totals.index_add_(0, slot_N.clamp(min=0), nll_N.masked_fill(slot_N < 0, 0.0))
        self.engine.all_reduce_sum([totals])
        return totals.cpu()

    def _batches(
        self, packed_rows: Iterable[PackedRow], lengths: PromptLengths, *, distilled: bool = False
    ) -> Iterator[PackedBatch]:
        """This rank's packed batches of the packed rows, on the device."""
        max_tokens = self.budget.tokens

        def planned() -> Iterator[tuple[list[PackedRow], float]]:
            most = WINDOW_BATCHES * max_tokens * self.engine.world_size
            for window in portions(packed_rows, lambda packed_row: packed_row.num_tokens, most):
                plan = plan_batches(window, lengths.tokens, self.engine.world_size, max_tokens)
                mine = plan[self.engine.rank]
                yield from ((batch, len(window) / len(mine)) for batch in mine)

        def make(planned: tuple[list[PackedRow], float]) -> tuple[PackedBatch, float]:
            mine, texts = planned
            return prepare_batch(mine, lengths, self.engine.device, distilled=distilled), texts

        texts = 0.0
        for prepared, share in prefetched(make, planned()):
            self._between_batches(texts)
            yield prepared.to(self.engine.device)
            texts = share
        self._advance(texts)

    def _between_batches(self, texts: float) -> None:
        """Report texts that were read; raise ``Stopped`` on all ranks together if one must stop."""
        self._advance(texts)
        if self.engine.any_rank(stop_signals.stop_requested()):
            raise Stopped

    def _comparisons(
        self,
        requests: Sequence[Request],
        lengths: PromptLengths,
        virtual_tokens: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """``Scored.teacher_R2`` of every request; None without a teacher."""
        rows = [0 if r.teacher is None else len(r.rows.candidates) for r in requests]
        sums_R2 = torch.zeros(sum(rows), 2, dtype=torch.float64, device=self.engine.device)
        for batch in self._batches(_distilled_rows(requests), lengths, distilled=True):
            teacher_DH = read_teacher(self.base, batch, self.teachers)
            found = self.base(batch, virtual_tokens, teacher_DH)
            distilled_D = batch.distilled_D
            assert distilled_D is not None
            slots = batch.label_slot_N[distilled_D]
            sums_R2.index_add_(0, slots, found[:, distilled_D].T.double())
        self.engine.all_reduce_sum([sums_R2])
        return [
            None if request.teacher is None else part
            for request, part in zip(requests, sums_R2.cpu().split(rows), strict=True)
        ]

    def _result(self, request: Request, nll: Tensor, virtual_tokens: Sequence[Tensor]) -> Scored:
        rows, task = request.rows, request.rows.task
        if not request.by_labels:
            return Scored({})
        nll_RC = nll.view(-1, _width(request))
        right = torch.tensor(rows.gold)[:, None]
        nll_R, counts_R = nll_RC.gather(1, right)[:, 0].tolist(), rows.label_counts
        result = {
            "loss": sum(nll_R) / sum(counts_R),
            f"loss{STANDARD_ERROR}": ratio_standard_error(nll_R, counts_R),
        }
        if task.scored_by_likelihood:
            nll_RC = exclusive(nll_RC, rows.candidates)
            predicted: list[int] = nll_RC.argmin(1).tolist()
            result["accuracy"] = metrics.accuracy(predicted, rows.gold)
            f1 = macro_f1(predicted, rows.gold)
            result |= dict(zip(("macro_f1", f"macro_f1{STANDARD_ERROR}"), f1, strict=True))
        if task.metric in ("accuracy", "loss"):
            return Scored(result, nll_RC, nll_R)
        prompt = None if request.prompt is None else virtual_tokens[request.prompt]
        generated = self._generated(rows, prompt)
        return replace(generated, scores=result | generated.scores, nll_RC=nll_RC, nll_R=nll_R)

    def _generated(self, rows: EvalSet, prompt: Tensor | None) -> Scored:
        """Generate the target of every row and score it; of a dialogue, the last answer.

        Generated text and target are both decoded from token ids, with their ends cut, so what the
        chat template or the tokenizer adds to an answer is in both or in neither.
        """
        task = rows.task
        ending = StopCriteria.of(self.base.model.generation_config, self.tokenizer, task)
        examples = [c[right] for c, right in zip(rows.candidates, rows.gold, strict=True)]
        spans = [example.label_spans[-1] for example in examples]
        written = generate(
            self.engine,
            self.base,
            ending,
            [e.input_ids[:start] for e, (start, _) in zip(examples, spans, strict=True)],
            prompt,
            task.max_new_tokens,
            between_batches=self._between_batches,
            max_tokens=WRITTEN_TOKENS * self.budget.tokens,
        )
        code = task.metric == "execution"
        texts = [ending.text(ids, skip_special_tokens=code) for ids in written]
        targets = [
            ending.target(example.input_ids[start:stop])
            for example, (start, stop) in zip(examples, spans, strict=True)
        ]
        scores, correct = self._text_scores(rows, texts, targets)
        return Scored(scores, texts_R=texts, targets_R=targets, correct_R=correct)

    def _text_scores(
        self, rows: EvalSet, texts: Sequence[str], targets: Sequence[str]
    ) -> tuple[dict[str, float], list[bool]]:
        """Metrics of generated texts, and which are right. Only rank 0 runs generated code."""
        task = rows.task
        if task.metric == "execution":
            passed: list[float] = []
            if self.engine.is_main:
                values = (rows.rows[candidates[0].row] for candidates in rows.candidates)
                passed = metrics.execution(texts, [value[task.tests] for value in values])
            passed = self.engine.broadcast(passed)
            return {"execution": sum(passed) / len(passed)}, [score == 1.0 for score in passed]
        if task.multi_label:
            written, right = ([split_labels(t, task) for t in found] for found in (texts, targets))
            scores = metrics.label_set_scores(written, right, task)
            return scores, [set(a) == set(b) for a, b in zip(written, right, strict=True)]
        matches = metrics.matches(texts, targets)
        return {"exact_match": sum(matches) / len(matches)}, matches


def _num_slots(request: Request) -> int:
    return len(request.rows.candidates) * _width(request) if request.by_labels else 0


def _width(request: Request) -> int:
    """Candidates of each row."""
    return request.rows.candidates.width


def _packed_rows(requests: Sequence[Request], packed: bool, max_tokens: int) -> Iterator[PackedRow]:
    """All candidates of all rows of all requests; slots are numbered in this order.

    Args:
        packed: the base reads a row's text once for all its candidates. All packed batches then
            have ``PackedBatch.shared``, as ranks that share a head must agree on it.
        max_tokens: of a packed batch; a row with more tokens in all its candidates is read several
            times.
    """
    slot = 0
    for request in requests:
        if request.by_labels:
            for row in request.rows.candidates:
                if packed:
                    room = max(1, max_tokens - row[0].target_start)
                    parts = portions(row, lambda example: example.num_labels, room)
                    for part in parts:
                        yield PackedRow(part[0], request.prompt, slot, candidates=tuple(part))
                        slot += len(part)
                else:
                    for example in row:
                        yield PackedRow(example, request.prompt, slot)
                        slot += 1


def _distilled_rows(requests: Sequence[Request]) -> Iterator[PackedRow]:
    """The right candidates of all rows that have a teacher; slots number them in this order."""
    slot = 0
    for request in requests:
        if request.teacher is not None:
            for right, candidates in zip(request.rows.gold, request.rows.candidates, strict=True):
                yield PackedRow(candidates[right], request.prompt, slot, teacher=request.teacher)
                slot += 1


def _compared(teacher_R2: Tensor, counts_R: Sequence[int]) -> dict[str, float]:
    """Scores of rows from the divergence and the agreement summed over each one's labels."""
    kl_R, same_R = teacher_R2.T.tolist()
    return {
        "loss": sum(kl_R) / sum(counts_R),
        f"loss{STANDARD_ERROR}": ratio_standard_error(kl_R, counts_R),
        "agreement": sum(same_R) / sum(counts_R),
        f"agreement{STANDARD_ERROR}": ratio_standard_error(same_R, counts_R),
    }
