"""Cross-entropy of labels, fused with the head and computed in slices of the vocabulary.

Forward also computes d loss / d hidden, so no slice is computed twice and no logits are saved.
Labels of candidate targets may share a position. The product with the vocabulary is then computed
once per position, without gradients.

Shape letters: N labels, H hidden size, C columns of one slice of the vocabulary. Hidden states have
N rows, or fewer where labels share positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from trainer.model.layers.row_exchange import RowExchange
from trainer.model.layers.vocab_parallel import ExchangePlan, VocabBlock, VocabScan
from trainer.packing import activation_memory

#: Label of the padding rows that make all ranks send the same number of rows.
NO_LABEL = -1


class FusedCrossEntropy(torch.autograd.Function):
    """``softplus(logsumexp of the other logits - logit of the label)`` for every label.

    This equals the cross-entropy but avoids the cancellation in ``p - 1`` for likely labels, both
    in the loss and in the gradient, because the label's logit is not added to the others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        labels_N: Tensor,
        block: VocabBlock,
        plan: ExchangePlan | None,
        needs_gradient: bool,
        place_N: Tensor | None,
    ) -> Tensor:
        """Compute the losses, fp32 [N].

        Args:
            block: the full vocabulary if ``plan`` is None, else this rank's block.
            plan: exchange of hidden states with the ranks that hold the other blocks.
            place_N: row of ``hidden_NH`` that predicts each label; None: one row per label.
        """
        gradient_NH = None
        if plan is None:
            scan = _LabelScan(block, hidden_NH, labels_N, needs_gradient, place_N)
            margin_N = scan.margin()
            if needs_gradient:
                gradient_NH = scan.hidden_gradient(margin_N)
        else:
            # The same on all ranks: scoring shares positions, training does not.
            assert bool(plan.max_labels) == (place_N is not None)
            label_plan = plan if place_N is None else plan.for_labels(len(place_N))
            scan = _LabelScan(
                block,
                plan.gather(hidden_NH),
                label_plan.gather(labels_N, NO_LABEL),
                plan.needs_gradient,
                None if place_N is None else plan.gather_places(place_N),
            )
            scan.merge_labels(plan.exchange)
            gathered_margin_N = scan.margin()
            margin_N = label_plan.own(gathered_margin_N)
            if plan.needs_gradient:
                gathered_NH = scan.hidden_gradient(gathered_margin_N).to(hidden_NH.dtype)
                gradient_NH = plan.scatter_sum(gathered_NH)
        if needs_gradient:
            assert gradient_NH is not None
            ctx.save_for_backward(gradient_NH.to(hidden_NH.dtype))
        return softplus(margin_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        return (gradient_NH * grad_N[:, None]).to(gradient_NH.dtype), *(None,) * 5


class _LabelScan(VocabScan):
    """Online softmax whose ``top_N`` and ``total_N`` exclude the logit of the label.

    Attributes:
        label_logit_N: logit of the label, 0 if it is not in this block.
        label_slope_N: d logit / d product of the label.
        gradient_NH: sum over the other logits of ``exp(logit - top) * d logit / d hidden``.
    """

    def __init__(
        self,
        block: VocabBlock,
        hidden_NH: Tensor,
        labels_N: Tensor,
        needs_gradient: bool,
        place_N: Tensor | None,
    ) -> None:
        super().__init__(block, len(labels_N), labels_N.device)
        self._labels_N, self._place_N = labels_N, place_N
        self.label_logit_N = torch.zeros_like(self.top_N)
        self.label_slope_N = torch.full_like(self.top_N, block.scale)
        self.gradient_NH = (
            torch.zeros_like(hidden_NH, dtype=torch.float32) if needs_gradient else None
        )
        for start, stop in self.slices():
            self._add_slice(hidden_NH, start, stop)

    def _add_slice(self, hidden_NH: Tensor, start: int, stop: int) -> None:
        part = self.block.logit_slice(hidden_NH, start, stop, self.gradient_NH is not None)
        logits_NC, slope_NC = part.logits_NC, part.slope_NC
        if self._place_N is not None:
            logits_NC = logits_NC[self._place_N]
            slope_NC = slope_NC[self._place_N] if isinstance(slope_NC, Tensor) else slope_NC
        # Masks, because indexing the labels of a slice would synchronize with the device.
        is_here_N = self._labels_in(start, stop)
        column_N1 = (self._labels_N - start).clamp(0, stop - start - 1)[:, None]
        logit_N = logits_NC.gather(1, column_N1)[:, 0]
        self.label_logit_N = torch.where(is_here_N, logit_N, self.label_logit_N)
        if isinstance(slope_NC, Tensor):
            label_slope_N = slope_NC.gather(1, column_N1)[:, 0]
            self.label_slope_N = torch.where(is_here_N, label_slope_N, self.label_slope_N)
        logits_NC.scatter_(1, column_N1, logit_N.masked_fill(is_here_N, -torch.inf)[:, None])
        shrink_N = self.add(logits_NC, logits_NC.amax(1))
        if self.gradient_NH is not None:
            self.gradient_NH.mul_(shrink_N[:, None]).add_(part.hidden_gradient(logits_NC))

    def merge_labels(self, exchange: RowExchange) -> None:
        """Merge all blocks' sums; ``gradient_NH`` remains this block's share."""
        shrink_N, (self.label_logit_N,) = self.merge(exchange, self.label_logit_N)
        if self.gradient_NH is not None:
            self.gradient_NH.mul_(shrink_N[:, None])

    def margin(self) -> Tensor:
        """``logsumexp`` of the other logits minus the logit of the label, fp32 [N]."""
        return self.top_N + self.total_N.log() - self.label_logit_N

    def hidden_gradient(self, margin_N: Tensor) -> Tensor:
        """This block's share of d loss / d hidden, fp32 [N, H]; overwrites ``gradient_NH``."""
        assert self.gradient_NH is not None
        gradient_NH = self.gradient_NH.div_(self.total_N[:, None])
        first, stop = self.block.first, self.block.stop
        if first < stop:  # the last ranks' blocks may be empty
            slope_N1 = (self.label_slope_N * self._labels_in(first, stop))[:, None]
            token_ids_N = self._labels_N.clamp(first, stop - 1)
            size = max(1, activation_memory.LOGITS_BYTES // (4 * gradient_NH.shape[1]))
            chunks = (x.split(size) for x in (gradient_NH, token_ids_N, slope_N1))
            for chunk_NH, token_ids, slope in zip(*chunks, strict=True):
                chunk_NH -= self.block.dequantized_rows(token_ids).mul_(slope)
        return gradient_NH.mul_(margin_N.sigmoid()[:, None])

    def _labels_in(self, start: int, stop: int) -> Tensor:
        return (self._labels_N >= start) & (self._labels_N < stop)
