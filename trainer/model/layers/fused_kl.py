"""KL divergence from a teacher's next-token distributions, fused with the head, in slices.

Of the teacher, only the hidden states [D, H] before the head are kept. The logits of student and
teacher are computed one slice of the vocabulary at a time, in two passes: the first computes the
normalizers, the second the divergence and its gradient. A single pass with running maxima would
save one product but subtract two sums in the compute type. The second pass subtracts probabilities
in fp32, which keeps the digits of small differences.

Shape letters: D distilled positions, N = 2 D rows (students, then teachers), H hidden size,
C columns of a slice, S = 2 H: hidden states of student and teacher side by side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.model.layers.row_exchange import RowExchange
from trainer.model.layers.vocab_parallel import ExchangePlan, VocabBlock, VocabScan


class FusedKL(torch.autograd.Function):
    """``KL(teacher || student)``; d KL / d logit of the student = p_student - p_teacher."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_DH: Tensor,
        teacher_DH: Tensor,
        block: VocabBlock,
        plan: ExchangePlan | None,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        """Compute the divergences in nats, fp32 [D], and 1.0 where both top tokens agree, [D].

        ``block`` and ``plan`` are as in ``FusedCrossEntropy``.
        """
        states_DS = torch.cat([hidden_DH, teacher_DH], dim=1)
        if plan is None:
            scan = _PairScan(block, states_DS, None)
            kl_D, gradient_DH = scan.divergence(needs_gradient)
            best_2D = scan.best_2D
        else:
            scan = _PairScan(block, plan.gather(states_DS), plan.exchange)
            kl_D, gradient_DH = scan.divergence(plan.needs_gradient)
            kl_D = plan.own(plan.exchange.sum(kl_D))
            best_2D = torch.stack([plan.own(best_D) for best_D in scan.best_2D])
            if gradient_DH is not None:
                gradient_DH = plan.scatter_sum(gradient_DH.to(hidden_DH.dtype))
        if needs_gradient:
            assert gradient_DH is not None
            ctx.save_for_backward(gradient_DH.to(hidden_DH.dtype))
        agrees_D = (best_2D[0] == best_2D[1]).float()
        ctx.mark_non_differentiable(agrees_D)
        return kl_D.clamp(min=0), agrees_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_D: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (gradient_DH,) = ctx.saved_tensors
        return (gradient_DH * grad_D[:, None]).to(gradient_DH.dtype), *(None,) * 4


class _PairScan(VocabScan):
    """Online softmax of students and teachers over one block, normalized over all blocks.

    Attributes:
        best_2D: token id of the largest logit.
    """

    def __init__(self, block: VocabBlock, states_DS: Tensor, exchange: RowExchange | None) -> None:
        self._states_2DH = torch.stack(states_DS.chunk(2, dim=1))
        states_NH = self._states_2DH.flatten(0, 1)
        super().__init__(block, len(states_NH), states_NH.device)
        best_N = torch.zeros_like(self.top_N, dtype=torch.long)
        for start, stop in self.slices():
            logits_NC = block.logit_slice(states_NH, start, stop).logits_NC
            slice_top_N, slice_best_N = logits_NC.max(1)
            best_N = torch.where(slice_top_N > self.top_N, slice_best_N + start, best_N)
            self.add(logits_NC, slice_top_N)
        if exchange is not None:
            block_top_N = self.top_N
            self.merge(exchange)
            best_N = exchange.maximum(torch.where(block_top_N == self.top_N, best_N, -1))
        self.best_2D = best_N.view(2, -1)

    def divergence(self, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """This block's share of the divergences, [D], and of d KL / d hidden, fp32 [D, H]."""
        student_DH, teacher_DH = self._states_2DH
        # Kept apart: the sum ``top + log_total`` would round away digits of the probabilities.
        top_2D, log_total_2D = self.top_N.view(2, -1), self.total_N.log().view(2, -1)
        kl_D = torch.zeros_like(top_2D[0])
        gradient_DH = torch.zeros_like(student_DH, dtype=torch.float32) if needs_gradient else None
        for start, stop in self.slices():
            student = self.block.logit_slice(student_DH, start, stop, needs_gradient)
            teacher_DC = self.block.logit_slice(teacher_DH, start, stop).logits_NC
            student_DC = student.logits_NC
            for logits_DC, top_D, log_total_D in zip(
                (student_DC, teacher_DC), top_2D, log_total_2D, strict=True
            ):
                logits_DC.sub_(top_D[:, None]).sub_(log_total_D[:, None])
            teacher_p_DC = teacher_DC.exp()
            kl_D += (teacher_p_DC * teacher_DC.sub_(student_DC)).sum(1)
            if gradient_DH is not None:
                gradient_DH += student.hidden_gradient(student_DC.exp_().sub_(teacher_p_DC))
        return kl_D, gradient_DH
