"""How far a prompt's next-token distributions are from its teacher's, slice by slice.

Neither's logits ever exist for the whole vocabulary. What is kept of the teacher are its hidden
states behind the last layer, [D, H]; the head makes logits of both at once, a slice of the
vocabulary at a time, and reads it twice: first for the normalisers, then for the divergence and its
gradient. The second reading costs a product more than a running maximum would, but subtracts
probabilities while they are fp32: once the student has nearly learnt, their difference is what is
left, and would be lost in two sums of the compute type.

Where ranks share the head, the hidden states of both travel to its blocks as those of labels do.

Shape letters: D distilled positions, N label positions, H hidden size, C columns of a slice; S: two
states, the student's and the teacher's, side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from trainer.model.layers.lm_head import ExchangePlan, FrozenHead, VocabBlock


def taught_losses(
    head: FrozenHead,
    hidden_NH: Tensor,
    labels_N: Tensor,
    teacher_DH: Tensor,
    distilled_D: Tensor,
    logits_bytes: int,
    min_columns: int,
) -> Tensor:
    """Losses where some positions learn from a teacher instead of from their label.

    Ranks that share the head all call it together, with and without such positions.

    Args:
        teacher_DH: what goes into the head of the teacher.
        distilled_D: which of the N positions that is for.
        logits_bytes, min_columns: fp32 logits of a slice, and how narrow it may get.

    Returns:
        fp32 [2, N]: ``KL(teacher || student)`` in nats there, and the label's loss elsewhere; and 1
        where the teacher's likeliest token is the student's, too.
    """
    num_labels = len(labels_N)
    # The others in their order; sorted, for how many these are need not be waited for.
    taught_N = torch.zeros(num_labels, dtype=torch.int32, device=labels_N.device)
    taught_N = taught_N.index_fill(0, distilled_D, 1)
    rest = taught_N.argsort(stable=True)[: num_labels - len(distilled_D)]
    label_N = head.forward(_some(hidden_NH[rest]), _some(labels_N[rest]))[: len(rest)]
    kl_D, agree_D = _Divergence.apply(
        _some(hidden_NH[distilled_D]),
        _some(teacher_DH.detach()),
        head,
        (logits_bytes, min_columns),
        torch.is_grad_enabled() and hidden_NH.requires_grad,
    )
    num_distilled = len(distilled_D)
    losses_N = label_N.new_zeros(num_labels)
    losses_N = losses_N.index_copy(0, rest, label_N)
    losses_N = losses_N.index_copy(0, distilled_D, kl_D[:num_distilled])
    agree_N = torch.zeros_like(losses_N).index_copy(0, distilled_D, agree_D[:num_distilled])
    return torch.stack([losses_N, agree_N])


def _some(rows: Tensor) -> Tensor:
    """The rows, or one of zeros where there are none: other ranks may have some to exchange."""
    return rows if len(rows) else rows.new_zeros(1, *rows.shape[1:])


class _Divergence(torch.autograd.Function):
    """d KL / d logit of the student is the difference of the probabilities, student - teacher."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_DH: Tensor,
        teacher_DH: Tensor,
        head: FrozenHead,
        limits: tuple[int, int],
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        states_DS = torch.cat([hidden_DH.detach(), teacher_DH], dim=1)
        # ``meet`` counts what one state and its gradient move; the other's is near enough so.
        meeting = head.plan_exchange(
            hidden_DH, wants_gradient=wants_gradient, columns=head.in_features
        )
        if meeting is None:
            scan = _Scan(head.whole(hidden_DH.device), states_DS, limits, None)
            kl_D, pull_DH = scan.divergence(wants_gradient)
            best_2D = scan.best_2D
        else:
            scan = _Scan(head.block(), meeting.gather(states_DS), limits, meeting)
            kl_D, pull_DH = scan.divergence(meeting.wants_gradient)
            kl_D = meeting.own(meeting.exchange.sum(kl_D))
            best_2D = torch.stack([meeting.own(best_D) for best_D in scan.best_2D])
            if pull_DH is not None:
                pull_DH = meeting.exchange.scatter_sum(pull_DH.to(hidden_DH.dtype))
                pull_DH = pull_DH[: len(hidden_DH)]
        if wants_gradient:
            assert pull_DH is not None
            ctx.save_for_backward(pull_DH.to(hidden_DH.dtype))
        agree_D = (best_2D[0] == best_2D[1]).float()
        ctx.mark_non_differentiable(agree_D)
        return kl_D.clamp(min=0), agree_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_D: Tensor, _: Any) -> tuple[Tensor, None, None, None, None]:
        (pull_DH,) = ctx.saved_tensors
        return (pull_DH * grad_D[:, None]).to(pull_DH.dtype), None, None, None, None


class _Scan:
    """Both states' logits over a part of the vocabulary; normalised over all of it.

    Attributes:
        top_2D: the greatest logit.
        log_total_2D: logarithm of the sum of ``exp(logit - top)``. Apart from the first: their sum
            would round away digits of the probabilities.
        best_2D: the token of the greatest logit.
    """

    def __init__(
        self,
        block: VocabBlock,
        states_DS: Tensor,
        limits: tuple[int, int],
        meeting: ExchangePlan | None,
    ) -> None:
        logits_bytes, min_columns = limits
        # Of both states: half as many columns as for labels.
        self._columns = max(min_columns, logits_bytes // (8 * len(states_DS)))
        self._block = block
        self._states = torch.stack(states_DS.chunk(2, dim=1))
        flat = self._states.flatten(0, 1)
        lowest = torch.finfo(torch.float32).min
        top = flat.new_full((len(flat),), lowest, dtype=torch.float32)
        total, best = torch.zeros_like(top), torch.zeros_like(top, dtype=torch.long)
        for start, stop in self._slices():
            logits, _ = block.head.shape_logits(block.project(flat, start, stop))
            slice_top, slice_best = logits.max(1)
            best = torch.where(slice_top > top, slice_best + start, best)
            before, top = top, torch.maximum(top, slice_top)
            total = total * (before - top).exp() + logits.sub_(top[:, None]).exp_().sum(1)
        if meeting is not None:
            here, top = top, meeting.exchange.maximum(top)
            total = meeting.exchange.sum(total * (here - top).exp())
            best = meeting.exchange.maximum(torch.where(here == top, best, -1))
        shape = self._states.shape[:2]
        self.top_2D, self.log_total_2D = top.view(shape), total.log().view(shape)
        self.best_2D = best.view(shape)

    def divergence(self, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """This part's share of the divergence, [D], and of d KL / d hidden, fp32 [D, H]."""
        student_DH, teacher_DH = self._states
        kl_D = torch.zeros_like(self.top_2D[0])
        pull_DH = torch.zeros_like(student_DH, dtype=torch.float32) if wants_gradient else None
        head = self._block.head
        for start, stop in self._slices():
            with torch.set_grad_enabled(wants_gradient):
                x_DH = student_DH.detach().clone().requires_grad_(wants_gradient)
                product_DC = self._block.project(x_DH, start, stop)
            student_DC, slope_DC = head.shape_logits(product_DC.detach())
            teacher_DC, _ = head.shape_logits(self._block.project(teacher_DH, start, stop))
            for logits_DC, top_D, total_D in zip(
                (student_DC, teacher_DC), self.top_2D, self.log_total_2D, strict=True
            ):
                logits_DC.sub_(top_D[:, None]).sub_(total_D[:, None])
            share_DC = teacher_DC.exp()
            kl_D += (share_DC * teacher_DC.sub_(student_DC)).sum(1)
            if pull_DH is not None:
                pulls_DC = student_DC.exp_().sub_(share_DC).mul_(slope_DC).to(product_DC.dtype)
                (slice_DH,) = torch.autograd.grad(product_DC, x_DH, pulls_DC)
                pull_DH += slice_DH
        return kl_D, pull_DH

    def _slices(self) -> Iterator[tuple[int, int]]:
        for start in range(self._block.first, self._block.stop, self._columns):
            yield start, min(start + self._columns, self._block.stop)
