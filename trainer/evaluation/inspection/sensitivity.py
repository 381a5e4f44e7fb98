"""Attention that virtual tokens receive, and gradient times input, in one pass over rows.

Shape letters: T tokens of a packed batch, U keys (T tokens and those of prefixes), N label
positions, A attention heads, D head size, P virtual tokens, n queries of a bucket, K its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.scoring import Request
from trainer.model.attention.bucket_layout import Buckets, Scores
from trainer.model.attention.interface import batch_layout
from trainer.packing.packed_batch import PackedBatch
from trainer.packing.packed_row import PackedRow
from trainer.prompts.soft_prompt import SoftPrompt, prompt_lengths

#: Elements of the keys that are gathered at once.
GATHERED = 1 << 25


@dataclass(frozen=True)
class Sensitivity:
    """Measurements of one prompt.

    Attributes:
        attention_LP: share of attention of the positions that predict the answer, mean over heads
            and positions; NaN for a layer without attention. None: the family is not packed.
        gradient_P: gradient of the mean loss, times the value, summed over each virtual token.
    """

    attention_LP: Tensor | None
    gradient_P: Tensor


def measure_sensitivity(
    evaluator: Evaluator,
    requests: Sequence[Request],
    prompts: Sequence[SoftPrompt],
    advance: Callable[[float], None] = lambda texts: None,
) -> list[Sensitivity]:
    """Read the correct target of all rows once, with gradient; a collective.

    Args:
        requests: one for each prompt, in their order.
        advance: called with the number of texts read since the last call.

    Raises:
        Stopped: as ``Evaluator.score``.
    """
    engine, base = evaluator.engine, evaluator.base
    leaves = [prompt.leaf() for prompt in prompts]
    tensors = [leaf.tensor for leaf in leaves]
    counts = [float(sum(request.rows.label_counts)) for request in requests]
    layers = int(base.model.config.num_hidden_layers)
    offsets = [0]
    for prompt in prompts:
        offsets.append(offsets[-1] + prompt.num_virtual_tokens)
    totals_LS = torch.zeros(layers, offsets[-1], dtype=torch.float64, device=engine.device)
    seen_L = torch.zeros(layers, dtype=torch.float64, device=engine.device)
    gradients = [torch.zeros_like(tensor) for tensor in tensors]
    rows = _rows(requests, packed=base.packed)
    for batch in evaluator.batches(rows, prompt_lengths(prompts), advance=advance):
        observer = None
        if base.packed:
            layout = batch.layout or batch_layout(batch, engine.device)
            observer = AttentionObserver(batch, layout.buckets, offsets, totals_LS, seen_L)
            batch = replace(batch, layout=replace(layout, observer=observer))
        with torch.enable_grad():
            loss_N = base(batch, leaves).losses.loss_N
            if observer is not None:
                observer.is_done = True  # backward may repeat the forward of a layer
            weight_N = torch.tensor([1 / count for count in counts]).to(loss_N)
            weight_N = weight_N[batch.label_prompt_N] * (batch.label_slot_N >= 0)
            of_batch = torch.autograd.grad((loss_N * weight_N).sum(), tensors, allow_unused=True)
        for total, gradient in zip(gradients, of_batch, strict=True):
            if gradient is not None:
                total += gradient
    engine.all_reduce_sum([totals_LS, seen_L, *gradients])
    engine.end_step()
    results = []
    for k, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        attention_LP = None
        if base.packed:
            attention_LP = (totals_LS[:, offsets[k] : offsets[k + 1]] / counts[k]).float()
            attention_LP[seen_L == 0] = torch.nan
        product_P = (gradient * leaf.tensor.detach()).flatten(1).sum(1)
        results.append(
            Sensitivity(None if attention_LP is None else attention_LP.cpu(), product_P.cpu())
        )
    return results


def _rows(requests: Sequence[Request], *, packed: bool) -> list[PackedRow]:
    """Return the rows of all requests, each with its correct target only."""
    rows: list[PackedRow] = []
    for request in requests:
        shared = request.rows.num_shared if packed else 0
        for right, candidates in zip(request.rows.gold, request.rows.candidates, strict=True):
            rows.append(PackedRow(candidates[right], request.prompt, len(rows), shared=shared))
    return rows


class AttentionObserver:
    """Adds the attention of a packed batch's label positions on virtual tokens to sums.

    Args:
        offsets: index of each prompt's first virtual token in the sums.
        totals_LS: sums over queries, of the mean over heads, for the virtual tokens of all prompts.
        seen_L: counts the calls of each layer.

    Attributes:
        is_done: ignore further calls.
    """

    def __init__(
        self,
        batch: PackedBatch,
        buckets: Buckets,
        offsets: Sequence[int],
        totals_LS: Tensor,
        seen_L: Tensor,
    ) -> None:
        self.is_done = False
        self._buckets, self._totals_LS, self._seen_L = buckets, totals_LS, seen_L
        device, length = totals_LS.device, len(batch.token_ids_T)
        end = max((segment.end for _, segment in batch.past), default=length)
        place_U = torch.full((end,), -1, dtype=torch.long)
        for k, segment in (*batch.prompts, *batch.past):
            first = offsets[k]
            place_U[segment.start : segment.end] = torch.arange(first, first + segment.length)
        self._place_U = place_U.to(device)
        counted_N = (batch.label_slot_N >= 0).double()
        self._weight_T = torch.zeros(length, dtype=torch.float64, device=device)
        self._weight_T.index_add_(0, batch.label_positions_N, counted_N)

    @torch.no_grad()
    def __call__(self, query_ATD: Tensor, key_AUD: Tensor, scores: Scores, layer: int) -> None:
        if self.is_done:
            return
        self._seen_L[layer] += 1
        for bucket in self._buckets.each:
            counted_SQ = ~bucket.padding_SQ & (self._weight_T[bucket.query_SQ] > 0)
            segment_n, column_n = counted_SQ.nonzero(as_tuple=True)
            size = key_AUD.shape[0] * bucket.key_SK.shape[1] * key_AUD.shape[2]
            step = max(1, GATHERED // size)
            for s_n, q_n in zip(segment_n.split(step), column_n.split(step), strict=True):
                query_n = bucket.query_SQ[s_n, q_n]
                mask_nAK = bucket.mask_for(scores, query_ATD.dtype)[s_n, :, q_n]
                keys_nK = bucket.key_SK[s_n]
                share_nK = _attention(
                    query_ATD[:, query_n], key_AUD[:, keys_nK], mask_nAK.transpose(0, 1), scores
                )
                place_nK = self._place_U[keys_nK]
                weighted_nK = share_nK.double() * self._weight_T[query_n, None]
                self._totals_LS[layer].index_add_(
                    0,
                    place_nK.clamp(min=0).flatten(),
                    weighted_nK.masked_fill(place_nK < 0, 0).flatten(),
                )


def _attention(query_AnD: Tensor, key_AnKD: Tensor, mask_AnK: Tensor, scores: Scores) -> Tensor:
    """Attention probabilities [n, K] of each query, mean over heads, as ``attend`` computes them.

    Keys may have fewer heads (grouped queries).
    """
    grouped = query_AnD.unflatten(0, (key_AnKD.shape[0], -1)).float()
    score_AnK = torch.einsum("agnd,ankd->agnk", grouped, key_AnKD.float()).flatten(0, 1)
    score_AnK = score_AnK * scores.scaling
    if scores.softcap is not None:
        score_AnK = torch.tanh(score_AnK / scores.softcap) * scores.softcap
    if mask_AnK.dtype == torch.bool:
        score_AnK = score_AnK.masked_fill(~mask_AnK, -torch.inf)
    else:
        score_AnK = score_AnK + mask_AnK
    if scores.sinks_A is not None:
        sinks_An1 = scores.sinks_A.float()[:, None, None].expand(*score_AnK.shape[:2], 1)
        score_AnK = torch.cat([score_AnK, sinks_An1], dim=-1)
    return score_AnK.softmax(dim=-1)[..., : key_AnKD.shape[2]].mean(0)
