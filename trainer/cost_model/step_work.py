"""Packed batches of one step on every rank, counted without building them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trainer.packing.length_groups import group_by_length
from trainer.packing.packed_row import (
    NO_PROMPT,
    PackedRow,
    PromptLengths,
    segment_length,
    teacher_rows,
)
from trainer.packing.planning import plan_batches


@dataclass(frozen=True)
class BatchWork:
    """Counts of one packed batch.

    Attributes:
        tokens: of the packed batch, virtual tokens included.
        labels: tokens to predict.
        read: distinct positions that predict them.
        ids: distinct token ids, whose embeddings are looked up, ascending.
        learned: tokens of prompts; the embeddings of all others are constant.
        scores: products of a query with a key, per attention head, padding of buckets included.
        read_scores: those of the last layer, whose queries are the positions that predict labels.
        learned_scores: those in the first layer's backward on a CPU: of prompts' queries or keys.
        distilled: labels that learn from a teacher.
        teacher: the forward pass of the teachers, if any row of the step has one.
    """

    tokens: int
    labels: int
    read: int
    ids: NDArray[np.int64]
    scores: int
    learned: int = 0
    read_scores: int = 0
    learned_scores: int = 0
    distilled: int = 0
    teacher: BatchWork | None = None


def step_work(
    rows: Sequence[PackedRow], lengths: PromptLengths, num_ranks: int, max_tokens: int
) -> list[list[BatchWork]]:
    """Distribute the rows of an update as a run does: ``work[rank][micro-batch]``."""
    plan = plan_batches(rows, lengths.tokens, num_ranks, max_tokens)
    work = [[_batch_work(batch, lengths) for batch in rank] for rank in plan]
    if all(row.teacher is None for row in rows):
        return work
    return [
        [_with_teacher(own, batch) for own, batch in zip(*of_rank, strict=True)]
        for of_rank in zip(work, plan, strict=True)
    ]


def _with_teacher(work: BatchWork, rows: Sequence[PackedRow]) -> BatchWork:
    read, texts = teacher_rows(rows)
    teacher = _batch_work(read, PromptLengths(tuple(texts), (0,) * len(texts)))
    return replace(work, distilled=teacher.labels if texts else 0, teacher=teacher)


def _batch_work(rows: Sequence[PackedRow], lengths: PromptLengths) -> BatchWork:
    keys = {row.segment_key for row in rows if row.segment_key is not None}
    ids: set[int] = set()
    # length, length of what precedes it, positions that predict labels
    segments: list[tuple[int, int, int]] = []
    before: dict[object, int] = {None: 0}
    tokens = read = read_scores = learned_scores = 0
    for key in keys:
        own = segment_length(key, lengths.tokens)
        past = 0 if key[0] == NO_PROMPT else lengths.past[key[0]]
        before[key] = past + own
        tokens += own
        if own:
            segments.append((own, past, 0))
            learned_scores += own * (own + past)
            ids |= {*key[2]} if own == len(key[2]) else {0, *key[2]}
    learned = tokens
    for row in rows:
        tree, ends = row.tree, list[int]()
        positions = {i for target in tree.targets for i in target.positions if i >= 0}
        for part in tree.segments:
            prefix = before[row.segment_key] if part.parent < 0 else ends[part.parent]
            length = part.stop - part.start
            predicting = sum(part.start <= i < part.stop for i in positions)
            segments.append((length, prefix, predicting))
            ends.append(prefix + length)
            learned_scores += length * before[row.segment_key]
        read += len(positions)
        ids.update(tree.token_ids)
        tokens += len(tree.token_ids)
    scores = 0
    for group in group_by_length(segments, lambda segment: segment[0]):
        longest = group[0][0]
        num_keys = longest + max(prefix for _, prefix, _ in group)
        scores += len(group) * longest * num_keys
        counts = [predicting for *_, predicting in group if predicting]
        read_scores += len(counts) * max(counts, default=0) * num_keys
    labels = sum(len(target.labels) for row in rows for target in row.tree.targets)
    # Rows without text before their label are predicted from the last position of their prompt.
    read += len(
        {r.segment_key for r in rows if any(i < 0 for t in r.tree.targets for i in t.positions)}
    )
    return BatchWork(
        tokens=tokens,
        labels=labels,
        read=read,
        ids=np.array(sorted(ids), np.int64),
        scores=scores,
        learned=learned,
        read_scores=read_scores,
        learned_scores=min(scores, learned_scores),
    )
