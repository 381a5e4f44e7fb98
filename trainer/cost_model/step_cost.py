"""FLOPs, gathered bytes and saved bytes of one step. Imports no torch.

Formulas: a frozen linear layer of P elements takes 2P FLOPs per token forward and 2P for the
input-gradient; a recomputed one 2P more. The first and the last layer compute less
(``trainer.model.layers.end_layers``). A rank receives (s - 1)/s of the bytes that it gathers from a
shard group of s ranks (ring all-gather).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trainer.cost_model.base_shape import BaseShape
from trainer.cost_model.step_work import BatchWork
from trainer.distributed.placement import LIVE_LAYERS, Placement
from trainer.packing.activation_memory import BatchMemory, logit_columns

#: FLOPs of attention per product of a query with a key and element of a head: scores and sums of
#: values, each a multiplication and an addition; five such products in backward.
FORWARD_SCORES, BACKWARD_SCORES = 4, 10
#: Products with the head per label: logits, and the gradient of the hidden state. Of a distilled
#: label: logits of prompt and teacher, twice, and the gradient.
HEAD_PASSES, DISTILLED_PASSES = 2, 5
ID_BYTES = COUNT_BYTES = 8


@dataclass(frozen=True)
class StepCost:
    """Cost of one step on the rank that does the most.

    Attributes:
        flops: of matrix products; ``linear_flops`` of them in linear layers, and
            ``attention_flops`` in attention.
        step_tokens: of all packed batches of a rank.
        gathered_bytes: received for the base, exchanged rows included.
        exchanged_bytes: embeddings, hidden states sent to the head, or the head itself.
        saved_bytes: from forward to backward of the largest packed batch.
        logits_bytes: of the largest slice of logits.
        tokens: of the largest packed batch; a share ``unread`` of them predicts no label.
        micro_batches: packed batches of each rank.
    """

    flops: float
    gathered_bytes: int
    exchanged_bytes: int
    saved_bytes: int
    logits_bytes: int
    tokens: int
    micro_batches: int
    linear_flops: float = 0.0
    attention_flops: float = 0.0
    step_tokens: int = 0
    unread: float = 0.0


def step_cost(
    base: BaseShape,
    memory: BatchMemory,
    placement: Placement,
    work: Sequence[Sequence[BatchWork]],
    *,
    checkpointing: bool,
    itemsize: int,
    on_cpu: bool,
) -> StepCost:
    """Compute the cost of a step from its packed batches, ``work[rank][micro-batch]``."""
    group = placement.group_size
    parts = [work[first : first + group] for first in range(0, len(work), group)]
    exchanged, shared = max(_exchanged(base, placement, part, itemsize) for part in parts)
    batches = [batch for rank in work for batch in rank]
    largest = max(batches, key=lambda batch: batch.tokens)
    passes = 3 if largest.teacher is not None else 2
    layers = _gathered_layers(base, placement, len(work[0]), passes)
    unread = 1 - largest.read / largest.tokens
    saved = largest.tokens * replace(memory, margin=1.0).saved(checkpointing, unread)
    flops = [step_flops(base, memory, rank, checkpointing=checkpointing) for rank in work]
    linear, attention, head = max(flops, key=sum)
    return StepCost(
        flops=linear + attention + head,
        gathered_bytes=layers + exchanged,
        exchanged_bytes=exchanged,
        saved_bytes=int(saved),
        logits_bytes=_logits_bytes(base, group if shared else 1, batches, on_cpu),
        tokens=largest.tokens,
        micro_batches=len(work[0]),
        linear_flops=linear,
        attention_flops=attention,
        unread=unread,
        step_tokens=max(sum(batch.tokens for batch in rank) for rank in work),
    )


def step_flops(
    base: BaseShape, memory: BatchMemory, batches: Sequence[BatchWork], *, checkpointing: bool
) -> tuple[float, float, float]:
    """FLOPs of one rank's packed batches: linear layers, attention, head.

    Forward and backward, and forward alone of the teachers.
    """
    tokens = sum(batch.tokens for batch in batches)
    labels = sum(batch.labels for batch in batches)
    scores = sum(batch.scores for batch in batches)
    sizes = memory.sizes
    linear = 2 * (2 * base.multiplied + checkpointing * base.recomputed) * tokens
    mlp, mlp_again = base.last_mlp if sizes.limits_last_mlp else (0.0, 0.0)
    linear -= 2 * (2 * mlp + checkpointing * mlp_again) * (tokens - _read(batches))
    only_read = base.only_read if sizes.limits_ends else 0
    only_learned = base.only_learned if sizes.limits_ends else 0
    linear -= 2 * (2 + checkpointing) * only_read * (tokens - _read(batches))
    linear -= 2 * only_learned * (tokens - sum(batch.learned for batch in batches))
    passes = (1 + checkpointing) * FORWARD_SCORES + BACKWARD_SCORES
    attention = passes * scores * sizes.query_width * sizes.layers
    if sizes.limits_ends:
        attention -= passes * _unread_scores(batches) * sizes.query_width
        if sizes.layers > 1 and not memory.rows.copied and not sizes.keeps_scores:
            constant = scores - sum(batch.learned_scores for batch in batches)
            attention -= BACKWARD_SCORES * constant * sizes.query_width
    taught = [batch.teacher for batch in batches if batch.teacher is not None]
    taught_tokens = sum(teacher.tokens for teacher in taught)
    unread = taught_tokens - _read(taught)
    linear += 2 * (base.multiplied * taught_tokens - (mlp + only_read) * unread)
    scores = sum(teacher.scores for teacher in taught)
    scores = scores * sizes.layers - (_unread_scores(taught) if sizes.limits_ends else 0)
    attention += FORWARD_SCORES * scores * sizes.query_width
    distilled = sum(batch.distilled for batch in batches)
    products = HEAD_PASSES * (labels - distilled) + DISTILLED_PASSES * distilled
    head = products * 2 * base.vocab_size * base.hidden
    return linear, attention, head


def _read(batches: Sequence[BatchWork]) -> int:
    return sum(batch.read for batch in batches)


def _unread_scores(batches: Sequence[BatchWork]) -> int:
    return sum(batch.scores - batch.read_scores for batch in batches)


def _gathered_layers(base: BaseShape, placement: Placement, micro_batches: int, passes: int) -> int:
    """Bytes that a rank receives for layers in a step: kept ones once, others in every pass.

    A batch has two passes, or three with a teacher. Layers that are live at the end of a pass are
    not gathered again in the next one.
    """
    group, total = placement.group_size, base.gathered_bytes
    kept = min(placement.kept_bytes, total)
    once = min(total - kept, live_bytes(base))
    gathered = kept + (passes * (total - kept) - (passes - 1) * once) * micro_batches
    return int(gathered * (group - 1) / group)


def live_bytes(base: BaseShape) -> int:
    """Bytes of layers that are not kept and may be gathered at a time (``Placement.policy``)."""
    return LIVE_LAYERS * max(base.layer_bytes())


def _logits_bytes(base: BaseShape, sharing: int, batches: Sequence[BatchWork], on_cpu: bool) -> int:
    """fp32 bytes of a slice of logits, of the labels of all ranks that share the head."""
    labels = max(1, sharing * max(batch.labels for batch in batches))
    return 4 * labels * min(logit_columns(labels, on_cpu), -(-base.vocab_size // sharing))


def _exchanged(
    base: BaseShape, placement: Placement, work: Sequence[Sequence[BatchWork]], itemsize: int
) -> tuple[int, bool]:
    """Bytes that a rank of a shard group receives for embeddings and head in a step.

    Also returns whether hidden states are exchanged instead of the head.
    """
    group = placement.group_size
    if group == 1:
        return 0, False
    others, table = group - 1, base.head.num_bytes
    keeps = placement.kept_bytes >= base.gathered_bytes + table
    of_head, spent, gathered = 0.0, 0, False
    received = [0] * group
    for batches in zip(*work, strict=True):
        taught = [batch.teacher for batch in batches if batch.teacher is not None]
        for read in filter(None, (batches, taught)):
            for rank, num_bytes in enumerate(_looked_up(base, [batch.ids for batch in read])):
                received[rank] += num_bytes + others * COUNT_BYTES
        if gathered:
            continue
        of_head += 3 * COUNT_BYTES * others
        labels = max(batch.labels for batch in batches)
        # Hidden states and their gradients; of distilled labels, also the teacher's states.
        states = max(2 * batch.labels + batch.distilled for batch in batches)
        moved = states * group * base.hidden * itemsize
        if moved + (spent if keeps else 0) > table:
            of_head += table * others / group
            gathered = keeps
        else:
            spent += moved
            # States, labels, and three fp32 numbers reduced twice over.
            of_head += others * states * base.hidden * itemsize
            of_head += others * labels * (ID_BYTES + 3 * 2 * 4)
    return int(max(received) + of_head), spent > 0


def _looked_up(base: BaseShape, ids: Sequence[NDArray[np.int64]]) -> list[int]:
    """Bytes that each rank of a shard group receives to look up the ids of every rank."""
    width = base.embedding.unit
    num_rows = base.embedding.elements // width
    size = -(-num_rows // len(ids))  # as in ``row_exchange.block_rows``
    # [rank that looks up, rank that holds the row]
    counts = np.array([np.bincount(own // size, minlength=len(ids)) for own in ids])
    foreign = counts - np.diag(np.diag(counts))
    return [
        int(foreign[rank].sum()) * width * base.embedding.itemsize
        + int(foreign[:, rank].sum()) * ID_BYTES
        for rank in range(len(ids))
    ]
