"""Scoring requests, their results, and their conversion to packed rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from trainer.data.task_data import EvalSet
from trainer.data.teacher import Teacher
from trainer.evaluation.pass_at_k import Samples
from trainer.packing.packed_row import PackedRow
from trainer.packing.planning import portions


@dataclass(frozen=True)
class Request:
    """Score one set of rows with one prompt.

    Attributes:
        prompt: index of the prompt; None: the base model alone.
        teacher: compare the prompt's distributions with this teacher's.
        samples: with metric ``execution``: sample several answers per row; None: one greedy answer.
    """

    rows: EvalSet
    prompt: int | None
    teacher: Teacher | None = None
    samples: Samples | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether the result depends on the base model and the rows alone."""
        return self.by_labels and self.prompt is None

    @property
    def by_labels(self) -> bool:
        """Whether label likelihoods are scored: unless the metric is divergence from a teacher."""
        return self.teacher is None or self.rows.task.metric != "loss"

    @property
    def key(self) -> tuple[int, int | None, bool, Samples | None]:
        """Equal for requests with the same scores: the teacher adds further scores."""
        return id(self.rows), self.prompt, self.by_labels, self.samples

    @property
    def num_candidates(self) -> int:
        """Number of candidates of each row."""
        return self.rows.candidates.width

    @property
    def num_slots(self) -> int:
        """Number of candidates of all rows; 0 if labels are not scored."""
        return len(self.rows.candidates) * self.num_candidates if self.by_labels else 0


@dataclass(frozen=True)
class Scored:
    """Result of one request, equal on all ranks.

    Attributes:
        nll_RC: negative log-likelihood of every candidate of every row, in nats, float64, on the
            CPU; rows and candidates as in ``EvalSet.candidates``. The predicted choice of a row is
            the candidate with the lowest value. The likelihood of a choice that is a prefix of
            another choice excludes texts that continue as the longer one
            (``trainer.data.label_prefixes``); the loss includes them. None if labels are not
            scored.
        nll_R: negative log-likelihood of every row's correct target; the loss is computed from it.
        texts_R: generated text of every row; None if nothing is generated.
        targets_R: text of every row's target, decoded in the same way as the generated text.
        correct_R: whether the generated text of a row is correct by the task's metric; for sets of
            labels, whether the set is equal. None if several answers are sampled.
        samples_R: sampled answers of every row, each with whether it passes the row's tests; None
            if none are sampled.
        teacher_R2: divergence from the teacher in nats and number of positions with the same most
            likely token, both summed over the labels of every row; None without a teacher.
    """

    scores: dict[str, float]
    nll_RC: Tensor | None = None
    nll_R: list[float] | None = None
    texts_R: list[str] | None = None
    targets_R: list[str] | None = None
    correct_R: list[bool] | None = None
    samples_R: list[list[tuple[str, bool]]] | None = None
    teacher_R2: Tensor | None = None

    @property
    def predicted(self) -> list[int]:
        """As ``comparable_choices``."""
        assert self.nll_RC is not None, "labels are not scored"
        return comparable_choices(self.nll_RC)


def comparable_choices(nll_RC: Tensor) -> list[int]:
    """Index of the most likely candidate of each row, -1 if the row has none.

    That is, if a likelihood is not a number, or all are zero.
    """
    lowest = nll_RC.min(1)  # NaN if any is
    choices: list[int] = lowest.indices.masked_fill(~lowest.values.isfinite(), -1).tolist()
    return choices


def candidate_rows(
    requests: Sequence[Request], packed: bool, max_tokens: int
) -> Iterator[PackedRow]:
    """Yield all candidates of all rows of all requests; slots number them in this order.

    The base reads the text that all rows share once per packed batch, and a row's text once for all
    its candidates. All packed batches have ``PackedBatch.place_N``, because ranks that share a head
    must agree on it.

    Args:
        packed: the family supports packed rows. Otherwise every candidate is a padded row, which
            contains all text before it, so nothing is shared.
        max_tokens: limit of a packed batch; a row whose candidates exceed it is read several times.
    """
    slot = 0
    for request in requests:
        shared = request.rows.num_shared if packed else 0
        for row in request.rows.candidates if request.by_labels else ():
            room = max(1, max_tokens - row[0].target_start) if packed else 0
            for candidates in portions(row, lambda example: example.num_labels, room):
                yield PackedRow(
                    candidates[0],
                    request.prompt,
                    slot,
                    candidates=tuple(candidates),
                    shared=shared,
                    share=len(candidates) / len(row),
                )
                slot += len(candidates)


def distilled_rows(requests: Sequence[Request], packed: bool) -> Iterator[PackedRow]:
    """Yield the correct candidate of all rows with a teacher; slots number them in this order."""
    slot = 0
    for request in requests:
        if request.teacher is not None:
            shared = request.rows.num_shared if packed else 0
            for right, candidates in zip(request.rows.gold, request.rows.candidates, strict=True):
                yield PackedRow(
                    candidates[right],
                    request.prompt,
                    slot,
                    teacher=request.teacher,
                    shared=shared,
                )
                slot += 1
