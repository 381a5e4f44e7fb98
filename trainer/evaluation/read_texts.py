"""Read texts without a prompt, packed: next-token distributions and mean hidden states.

The text that all of them begin with is read once per packed batch, such as fixed examples in
context.

Shape letters: R texts, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

import torch
from torch import Tensor

from trainer.data.token_table import Example
from trainer.evaluation.evaluator import Evaluator
from trainer.model.prompted_model import HiddenStatesRequest, NextTokenRequest
from trainer.packing.packed_row import PackedRow, PromptLengths

Advance = Callable[[float], None]

NO_PROMPTS = PromptLengths((), ())
#: Bytes of the logits of the texts that a rank reads together, about.
LOGITS_BYTES = 256 << 20


@torch.no_grad()
def next_token_log_probabilities(
    evaluator: Evaluator, texts: Sequence[Sequence[int]], advance: Advance
) -> tuple[list[int], Tensor]:
    """Compute the distribution of the token after each text; a collective.

    Args:
        advance: called with the number of texts read since the last call.

    Returns:
        Indices of this rank's texts, and their log-probabilities, fp32 [R, V], on the CPU.
    """
    indices: list[int] = []
    parts = [torch.empty(0, evaluator.base.vocab_size)]
    rows = _rows(texts, [len(text) for text in texts], evaluator.base.packed)
    most = max(1, LOGITS_BYTES // (4 * evaluator.base.vocab_size)) * evaluator.engine.world_size
    for start in range(0, len(rows), most):
        for batch in evaluator.batches(rows[start : start + most], NO_PROMPTS, advance=advance):
            logits_NV = evaluator.base(NextTokenRequest(batch), []).logits_BV
            slots = batch.label_slot_N.tolist()
            mine = [place for place, slot in enumerate(slots) if slot >= 0]
            indices += [slots[place] for place in mine]
            parts.append(logits_NV[mine].log_softmax(-1).cpu())
    return indices, torch.cat(parts)


@torch.no_grad()
def mean_hidden_states(
    evaluator: Evaluator, texts: Sequence[Sequence[int]], advance: Advance
) -> Tensor:
    """Mean of the last hidden states over the tokens of every text; a collective.

    Tokens that all texts begin with are left out: their states are the same in every text.

    Returns:
        fp32 [R, H] on the CPU, on every rank.
    """
    first = min(num_common(texts), min(map(len, texts)) - 1)
    engine = evaluator.engine
    sums_RH: Tensor | None = None
    rows = _rows(texts, [first + 1] * len(texts), evaluator.base.packed)
    for batch in evaluator.batches(rows, NO_PROMPTS, advance=advance):
        hidden_NH = evaluator.base(HiddenStatesRequest(batch), []).hidden_NH.float()
        if sums_RH is None:
            sums_RH = hidden_NH.new_zeros(len(texts), hidden_NH.shape[1])
        slot_N = batch.label_slot_N
        hidden_NH = hidden_NH.masked_fill((slot_N < 0)[:, None], 0.0)
        sums_RH.index_add_(0, slot_N.clamp(min=0), hidden_NH)
    assert sums_RH is not None, "every rank reads at least one batch"
    engine.all_reduce_sum([sums_RH])
    counts_R = torch.tensor([len(text) - first for text in texts])
    return sums_RH.cpu() / counts_R[:, None]


def num_common(texts: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all texts have in common."""
    ends = min(map(tuple, texts)), max(map(tuple, texts))  # all others are between these
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))


def _rows(
    texts: Sequence[Sequence[int]], first_labels: Sequence[int], packed: bool
) -> list[PackedRow]:
    """Rows whose labels are predicted at the places to read: from ``first_labels - 1`` to the end.

    A token after the end is the last label; nothing reads it.
    """
    shared = num_common(texts) if packed else 0
    return [
        PackedRow(
            Example.with_target((*text, text[-1]), first, number), None, number, shared=shared
        )
        for number, (text, first) in enumerate(zip(texts, first_labels, strict=True))
    ]
