"""The head, and the loss behind it without ever holding the logits of the whole vocabulary.

The vocabulary is read slice by slice, as flash attention reads keys (online softmax, arXiv
1805.02867): a running maximum, sum and gradient are rescaled as they grow. Forward already finds
what backward needs, d loss / d hidden, so no slice is computed twice and no logits are kept. A head
stored in fewer bits than it computes in is widened one slice at a time, too.

Shape letters: N label positions, H hidden size, V vocabulary, C columns of one slice of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from trainer.base.linear import FrozenLinear
from trainer.base.quantization import INT8_MAX

#: Bytes of fp32 logits that exist at a time, and the fewest columns that are worth a product.
LOGITS_BYTES = 64 << 20
MIN_COLUMNS = 1024


class FrozenHead(FrozenLinear):
    """From hidden states to logits, or to losses where the labels are known.

    Attributes:
        scale: what logits are multiplied by (Cohere).
        softcap: logits pass through ``softcap * tanh(logit / softcap)`` (Gemma 2).
    """

    scale: float = 1.0
    softcap: float | None = None

    def forward(self, x: Tensor, labels_N: Tensor | None = None) -> Tensor:
        """The bare product, for the model to scale or cap; with labels all of that is done here.

        Args:
            x: hidden states [..., H]; with labels [N, H].

        Returns:
            Without labels [..., V]; with them the negative log-likelihood of each, fp32 [N].
        """
        if labels_N is None:
            return super().forward(x)
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        nll_N: Tensor = _LabelLosses.apply(x, labels_N, self, wants_gradient)
        return nll_N

    def project(self, x_NH: Tensor, start: int, stop: int) -> Tensor:
        """Columns ``start`` to ``stop`` of the product, in the type of ``x``, [N, C]."""
        y_NC = self.product(x_NH, partial(self._slice, start, stop))
        return y_NC if self.bias is None else y_NC + self.bias[start:stop].to(x_NH.dtype)

    def rows(self, token_ids: Tensor) -> Tensor:
        """Rows of the weight, fp32 [N, H]."""
        rows_NH = self.weight[token_ids].float()
        return rows_NH if self.absmax is None else rows_NH * self._scales()[token_ids, None]

    def shape_logits(self, product: Tensor) -> tuple[Tensor, Tensor | float]:
        """Logits, scaled and capped, fp32 and new, and their slope over the product."""
        logits = product.to(torch.float32, copy=True)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is None:
            return logits, self.scale
        tanh = torch.tanh(logits / self.softcap)
        return tanh * self.softcap, (1 - tanh * tanh) * self.scale

    def _slice(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        return self.weight[start:stop], (
            None if self.absmax is None else self._scales()[start:stop]
        )

    def _scales(self) -> Tensor:
        assert self.absmax is not None
        return self.absmax / INT8_MAX


class _LabelLosses(torch.autograd.Function):
    """``softplus(logsumexp of the other logits - logit of the label)`` for every label.

    That is the cross-entropy; kept apart from the others, a likely label loses no digits to
    ``p - 1``, neither in the loss nor in the gradient, whatever the compute type.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, labels_N: Tensor, head: FrozenHead, wants_gradient: bool
    ) -> Tensor:
        num_labels, vocab_size = len(labels_N), head.out_features
        # Finite, so that a slice with nothing but a label in it subtracts no infinities.
        lowest = torch.finfo(torch.float32).min
        top_N = torch.full_like(labels_N, lowest, dtype=torch.float32)
        total_N, right_N = torch.zeros_like(top_N), torch.zeros_like(top_N)
        slope_N = torch.ones_like(top_N)
        pull_NH = torch.zeros_like(hidden_NH, dtype=torch.float32) if wants_gradient else None
        columns = max(MIN_COLUMNS, LOGITS_BYTES // (4 * max(1, num_labels)))
        for start in range(0, vocab_size, columns):
            stop = min(start + columns, vocab_size)
            with torch.set_grad_enabled(wants_gradient):
                x_NH = hidden_NH.detach().requires_grad_(wants_gradient)
                product_NC = head.project(x_NH, start, stop)
            logits_NC, slope_NC = head.shape_logits(product_NC.detach())
            mine = ((labels_N >= start) & (labels_N < stop)).nonzero()[:, 0]
            place = labels_N[mine] - start
            right_N[mine] = logits_NC[mine, place]
            if isinstance(slope_NC, Tensor):
                slope_N[mine] = slope_NC[mine, place]
            logits_NC[mine, place] = -torch.inf

            before_N = top_N
            top_N = torch.maximum(before_N, logits_NC.amax(1))
            shrunk_N = (before_N - top_N).exp()
            share_NC = logits_NC.sub_(top_N[:, None]).exp_()
            total_N = total_N * shrunk_N + share_NC.sum(1)
            if pull_NH is not None:
                pulls_NC = share_NC.mul_(slope_NC).to(product_NC.dtype)
                (slice_NH,) = torch.autograd.grad(product_NC, x_NH, pulls_NC)
                pull_NH.mul_(shrunk_N[:, None]).add_(slice_NH)
        margin_N = top_N + total_N.log() - right_N
        if pull_NH is not None:
            if head.softcap is None:
                slope_N.fill_(head.scale)
            pull_NH.div_(total_N[:, None]).sub_(head.rows(labels_N).mul_(slope_N[:, None]))
            pull_NH.mul_(margin_N.sigmoid()[:, None])
            ctx.save_for_backward(pull_NH.to(hidden_NH.dtype))
        return softplus(margin_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        (pull_NH,) = ctx.saved_tensors
        return (pull_NH * grad_N[:, None]).to(pull_NH.dtype), None, None, None
