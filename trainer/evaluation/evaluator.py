"""Score prompts on evaluation rows.

All prompts are scored in one packed pass. Every (prompt, row, candidate) has a slot. Each rank adds
the losses of its packed batches to their slots, and one all-reduce sums the slots of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.config import Task
from trainer.data.column_parsers import split_labels
from trainer.data.label_prefixes import exclusive
from trainer.data.task_data import EvalSet
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.prefetch import prefetched, prepare_batch
from trainer.evaluation import metrics
from trainer.evaluation.baseline_cache import BaselineCache
from trainer.evaluation.generation import Generated, generate
from trainer.evaluation.pass_at_k import TOP_P, Samples
from trainer.evaluation.scoring import (
    Request,
    Scored,
    candidate_rows,
    comparable_choices,
    distilled_rows,
)
from trainer.evaluation.statistics import ratio_scores
from trainer.evaluation.stop_criteria import StopCriteria
from trainer.evaluation.token_sampling import Sampling
from trainer.model.prompted_model import PromptedBase, read_teacher
from trainer.packing.activation_memory import TokenBudget
from trainer.packing.packed_batch import PackedBatch
from trainer.packing.packed_row import PackedRow, PromptLengths
from trainer.packing.planning import plan_batches, windows
from trainer.prompts.soft_prompt import SoftPrompt, prompt_lengths
from trainer.runtime import stop_signals
from trainer.runtime.stop_signals import Stopped

#: Packed batches of each rank that are planned together.
WINDOW_BATCHES = 64


@dataclass
class Evaluator:
    """Scores requests; the prompts are passed with each call.

    Attributes:
        teachers: token embeddings of the teachers' texts, by ``Teacher.index``.
        baselines: cached likelihoods under the base model alone.
        reused: number of requests that the cache answered.
    """

    engine: Engine
    base: PromptedBase
    tokenizer: PreTrainedTokenizerBase
    budget: TokenBudget
    teachers: Sequence[SoftPrompt] = ()
    baselines: BaselineCache | None = None
    reused: int = 0

    def __post_init__(self) -> None:
        self._advance: Callable[[float], None] = lambda texts: None

    @torch.no_grad()
    def score(
        self,
        requests: Sequence[Request],
        virtual_tokens: Sequence[SoftPrompt],
        advance: Callable[[float], None] = lambda texts: None,
    ) -> list[Scored]:
        """Score every request: ``loss``, its standard error and the task's metric; a collective.

        With a teacher, the loss is the mean divergence from it, in nats per position, and
        ``agreement`` is the share of positions where both have the same most likely token.

        Args:
            virtual_tokens: [P, H], or keys and values, of every prompt.
            advance: called with the number of texts read since the last call; ``num_texts`` is the
                total.

        Raises:
            Stopped: on all ranks, between two packed batches or two batches of generation, if one
                of them received a stop signal.
        """
        self._advance = advance
        lengths = prompt_lengths(virtual_tokens)
        distinct = list({request.key: request for request in requests}.values())
        cached = self._read_cache(distinct)
        missing = [r for r, nll in zip(distinct, cached, strict=True) if nll is None]
        slots = [request.num_slots for request in missing]
        computed = iter(self._candidate_nll(missing, lengths, virtual_tokens).split(slots))
        nll = [next(computed) if known is None else known for known in cached]
        if self.baselines is not None and self.engine.is_main:
            for request, known, value in zip(distinct, cached, nll, strict=True):
                if known is None and request.is_baseline:
                    nll_RC = value.view(-1, request.num_candidates).numpy()
                    self.baselines.write(request.rows.candidates, nll_RC)
        results = {
            request.key: self._result(request, value, virtual_tokens)
            for request, value in zip(distinct, nll, strict=True)
        }
        scored = [results[request.key] for request in requests]
        from_cache = {r.key for r, known in zip(distinct, cached, strict=True) if known is not None}
        self.reused += sum(request.key in from_cache for request in requests)
        if any(request.teacher is not None for request in requests):
            sums = self._compare_with_teachers(requests, lengths, virtual_tokens)
            for i, (request, teacher_R2) in enumerate(zip(requests, sums, strict=True)):
                if teacher_R2 is not None:
                    scores = dict(scored[i].scores)
                    for name, sums_R in zip(("loss", "agreement"), teacher_R2.T, strict=True):
                        scores |= ratio_scores(name, sums_R.tolist(), request.rows.label_counts)
                    scored[i] = replace(scored[i], scores=scores, teacher_R2=teacher_R2)
        self.engine.end_step()
        return scored

    def num_texts(self, requests: Sequence[Request]) -> int:
        """Number of texts that ``score`` reads: rows and generations."""
        texts = 0
        for request in {request.key: request for request in requests}.values():
            if request.by_labels:
                passes = 1 if request.rows.task.scored_by_likelihood else 2
                passes += request.samples.count - 1 if request.samples else 0
                texts += passes * len(request.rows.candidates)
        return texts + sum(len(r.rows.candidates) for r in requests if r.teacher is not None)

    def _read_cache(self, requests: Sequence[Request]) -> list[Tensor | None]:
        """Read cached likelihoods on every rank; None for requests that are not cached."""
        if self.baselines is None or not any(request.is_baseline for request in requests):
            return [None] * len(requests)
        arrays = None
        if self.engine.is_main:
            arrays = [
                self.baselines.read(request.rows.candidates) if request.is_baseline else None
                for request in requests
            ]
        arrays = self.engine.broadcast(arrays)
        assert arrays is not None
        for request, array in zip(requests, arrays, strict=True):
            if array is not None:
                self._advance(len(request.rows.candidates))
        return [None if array is None else torch.from_numpy(array).flatten() for array in arrays]

    def _candidate_nll(
        self,
        requests: Sequence[Request],
        lengths: PromptLengths,
        virtual_tokens: Sequence[SoftPrompt],
    ) -> Tensor:
        """Summed negative log-likelihood of each slot's target [slots], on every rank."""
        num_slots = sum(request.num_slots for request in requests)
        totals = torch.zeros(num_slots, dtype=torch.float64, device=self.engine.device)
        packed_rows = candidate_rows(requests, self.base.packed, self.budget.tokens)
        for batch in self.batches(packed_rows, lengths):
            nll_N = self.base(batch, virtual_tokens).losses.loss_N.double()
            slot_N = batch.label_slot_N  # -1 in a padding row, which does not count
            totals.index_add_(0, slot_N.clamp(min=0), nll_N.masked_fill(slot_N < 0, 0.0))
        self.engine.all_reduce_sum([totals])
        return totals.cpu()

    def batches(
        self,
        packed_rows: Iterable[PackedRow],
        lengths: PromptLengths,
        *,
        distilled: bool = False,
        advance: Callable[[float], None] | None = None,
    ) -> Iterator[PackedBatch]:
        """Yield this rank's packed batches of these rows, on the device; all have equally many.

        Args:
            distilled: rows have teachers.
            advance: as in ``score``; None: that of the current ``score``.

        Raises:
            Stopped: as ``score``.
        """
        if advance is not None:
            self._advance = advance
        max_tokens = self.budget.tokens

        def planned() -> Iterator[tuple[list[PackedRow], float]]:
            num_batches = WINDOW_BATCHES * self.engine.world_size
            for window in windows(packed_rows, lengths.tokens, max_tokens, num_batches):
                plan = plan_batches(window, lengths.tokens, self.engine.world_size, max_tokens)
                mine = plan[self.engine.rank]
                texts = sum(row.share for row in window)
                yield from ((batch, texts / len(mine)) for batch in mine)

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
        """Report texts read; raise ``Stopped`` on all ranks if one received a stop signal."""
        self._advance(texts)
        self.check_stop()

    def check_stop(self) -> None:
        """Raise ``Stopped`` on all ranks if one received a stop signal."""
        if self.engine.any_rank(stop_signals.stop_requested()):
            raise Stopped

    def _compare_with_teachers(
        self,
        requests: Sequence[Request],
        lengths: PromptLengths,
        virtual_tokens: Sequence[SoftPrompt],
    ) -> list[Tensor | None]:
        """``Scored.teacher_R2`` of every request; None without a teacher."""
        rows = [0 if r.teacher is None else len(r.rows.candidates) for r in requests]
        sums_R2 = torch.zeros(sum(rows), 2, dtype=torch.float64, device=self.engine.device)
        packed_rows = distilled_rows(requests, self.base.packed)
        for batch in self.batches(packed_rows, lengths, distilled=True):
            teacher_DH = read_teacher(self.base, batch, self.teachers)
            losses = self.base(batch, virtual_tokens, teacher_DH).losses
            distilled_D = batch.distilled_D
            assert distilled_D is not None
            slots = batch.label_slot_N[distilled_D]
            compared_N2 = torch.stack(losses, dim=1)
            sums_R2.index_add_(0, slots, compared_N2[distilled_D].double())
        self.engine.all_reduce_sum([sums_R2])
        return [
            None if request.teacher is None else of_request_R2
            for request, of_request_R2 in zip(requests, sums_R2.cpu().split(rows), strict=True)
        ]

    def _result(
        self, request: Request, nll: Tensor, virtual_tokens: Sequence[SoftPrompt]
    ) -> Scored:
        rows, task = request.rows, request.rows.task
        if not request.by_labels:
            return Scored({})
        nll_RC = nll.view(-1, request.num_candidates)
        right = torch.tensor(rows.gold)[:, None]
        nll_R: list[float] = nll_RC.gather(1, right)[:, 0].tolist()
        result = ratio_scores("loss", nll_R, rows.label_counts)
        if task.scored_by_likelihood:
            nll_RC = exclusive(nll_RC, rows.candidates)
            result |= metrics.choice_scores(comparable_choices(nll_RC), rows.gold)
        if task.metric in ("accuracy", "loss"):
            return Scored(result, nll_RC, nll_R)
        prompt = None if request.prompt is None else virtual_tokens[request.prompt]
        generated = (
            self._sampled(rows, prompt, request.samples)
            if request.samples
            else self._generated(rows, prompt)
        )
        return replace(generated, scores=result | generated.scores, nll_RC=nll_RC, nll_R=nll_R)

    def _generated(self, rows: EvalSet, prompt: SoftPrompt | None) -> Scored:
        """Generate the target of every row (of a dialogue: the last answer) and score it.

        Generated text and target are decoded from token ids and cut at their ends in the same way,
        so additions of the chat template or the tokenizer are in both or in neither.
        """
        task, stop = rows.task, self.stop_criteria(rows.task)
        generated = self.generate_targets(rows, prompt)
        code = task.metric == "execution"
        texts = [stop.text(text.ids, skip_special_tokens=code) for text in generated]
        targets = self._targets(rows)
        scores, correct = self._text_scores(rows, texts, targets)
        return Scored(scores, texts_R=texts, targets_R=targets, correct_R=correct)

    def _sampled(self, rows: EvalSet, prompt: SoftPrompt | None, samples: Samples) -> Scored:
        """Sample several answers of every row, and run them on its tests."""
        samplings = [
            [
                Sampling(samples.temperature, TOP_P, samples.seed(row, number))
                for number in range(samples.count)
            ]
            for row in rows.row_numbers
        ]
        stop = self.stop_criteria(rows.task)
        generated = iter(self.generate_targets(rows, prompt, samplings=samplings))
        texts_R = [
            [stop.text(next(generated).ids, skip_special_tokens=True) for _ in own]
            for own in samplings
        ]
        # Equal answers of a row are run once.
        distinct = [(i, text) for i, own in enumerate(texts_R) for text in dict.fromkeys(own)]
        passed = dict(zip(distinct, self._passed(rows, distinct), strict=True))
        return Scored(
            {},
            targets_R=self._targets(rows),
            samples_R=[[(text, passed[i, text]) for text in own] for i, own in enumerate(texts_R)],
        )

    def generate_targets(
        self,
        rows: EvalSet,
        prompt: SoftPrompt | None,
        advance: Callable[[float], None] | None = None,
        samplings: Sequence[Sequence[Sampling]] = (),
    ) -> list[Generated]:
        """Generate the target of every row (of a dialogue: the last answer); a collective.

        Args:
            advance: as in ``score``; None: that of the current ``score``.
            samplings: as in ``generate``.

        Raises:
            Stopped: as ``score``.
        """
        if advance is not None:
            self._advance = advance
        examples = rows.correct_examples
        return generate(
            self.engine,
            self.base,
            self.stop_criteria(rows.task),
            [example.input_ids[: example.last_target[0]] for example in examples],
            prompt,
            rows.task.max_new_tokens,
            between_batches=self._between_batches,
            max_tokens=self.budget.generation_tokens(),
            prompt_at=[example.prompt_at for example in examples],
            samplings=samplings,
        )

    def stop_criteria(self, task: Task) -> StopCriteria:
        """Return the ends of texts that are generated for a task."""
        return StopCriteria.of(self.base.model.generation_config, self.tokenizer, task)

    def _targets(self, rows: EvalSet) -> list[str]:
        """Text of every row's target, decoded as generated text is."""
        stop = self.stop_criteria(rows.task)
        return [stop.target(e.input_ids[slice(*e.last_target)]) for e in rows.correct_examples]

    def _passed(self, rows: EvalSet, texts: Sequence[tuple[int, str]]) -> list[bool]:
        """Whether generated code passes all tests of its row; rank 0 runs it.

        Args:
            texts: each with the index of its row in the set.
        """
        passed: list[float] = []
        if self.engine.is_main:
            tests = [rows.rows[row[0].row][rows.task.tests] for row in rows.candidates]
            passed = metrics.execution(
                [text for _, text in texts], [tests[row] for row, _ in texts]
            )
        return [score == 1.0 for score in self.engine.broadcast(passed)]

    def _text_scores(
        self, rows: EvalSet, texts: Sequence[str], targets: Sequence[str]
    ) -> tuple[dict[str, float], list[bool]]:
        """Return metrics of generated texts, and which are correct. Rank 0 runs generated code."""
        task = rows.task
        if task.metric == "execution":
            passed = self._passed(rows, list(enumerate(texts)))
            return {"execution": sum(passed) / len(passed)}, passed
        if task.multi_label:
            predicted = [split_labels(text, task) for text in texts]
            gold = [split_labels(text, task) for text in targets]
            scores = metrics.label_set_scores(predicted, gold, task)
            return scores, [set(a) == set(b) for a, b in zip(predicted, gold, strict=True)]
        matches = metrics.matches(texts, targets)
        return {"exact_match": sum(matches) / len(matches)}, matches
