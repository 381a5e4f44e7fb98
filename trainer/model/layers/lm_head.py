"""Language-model head: logits, or losses of labels without storing the full vocabulary's logits.

Ranks that share the head hold one block of its rows each (``trainer.model.layers.vocab_parallel``).
With few labels, their hidden states are sent to all blocks, which moves fewer bytes than the
weight. With many labels, the weight is all-gathered and, if memory permits, kept until the step
ends.

Shape letters: N labels, U positions that predict them (N unless positions are shared), D distilled
positions, H hidden size, V vocabulary, R rows of a block, C columns of the logits.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from trainer.model.layers.fused_cross_entropy import FusedCrossEntropy
from trainer.model.layers.fused_kl import FusedKL
from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.row_exchange import RowExchange
from trainer.model.layers.vocab_parallel import ExchangePlan, VocabBlock


class LabelLosses(NamedTuple):
    """Losses of the labels of a packed batch; a tuple, so that ZeRO-3's hooks find its tensors.

    Attributes:
        loss_N: fp32, in nats: negative log-likelihood of the label, or at a distilled position
            ``KL(teacher || student)``.
        agrees_N: fp32, 1 where student and teacher have the same most likely token, 0 elsewhere;
            None without a teacher.
    """

    loss_N: Tensor
    agrees_N: Tensor | None = None


class FrozenHead(FrozenLinear):
    """Map hidden states to logits or to losses of labels.

    Attributes:
        weight: Parameter [V, H] until ``hold`` replaces it with ``rows``.
        rows: buffer [R, H] after ``hold``: this rank's block of the weight, padded with zeros.
        scale: factor of the logits (Cohere).
        softcap: logits become ``softcap * tanh(logit / softcap)`` (Gemma 2); None: uncapped.
        keeps: keep a gathered weight until ``release``.
    """

    scale: float = 1.0
    softcap: float | None = None
    rows: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        quantized: bool,
        transposed: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, quantized, transposed)
        self.register_buffer("rows", None)
        self.keeps = False
        self._exchange: RowExchange | None = None
        self._gathered: Tensor | None = None
        self._exchanged_bytes = 0  # since ``release``

    def hold(self, rows: Tensor, exchange: RowExchange | None) -> None:
        """Replace the weight with this rank's block; see ``FrozenEmbedding.hold``."""
        self.register_parameter("weight", None)  # so that ZeRO-3 neither shards nor gathers it
        self.rows, self._exchange = rows, exchange

    def release(self) -> None:
        """Free a gathered weight."""
        self._gathered, self._exchanged_bytes = None, 0

    @property
    def table_bytes(self) -> int:
        """Bytes of the full weight as stored."""
        stored = self.weight if self.rows is None else self.rows
        return self.out_features * self.in_features * stored.element_size()

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        labels_N: Tensor,
        teacher_DH: Tensor | None = None,
        distilled_D: Tensor | None = None,
        place_N: Tensor | None = None,
    ) -> LabelLosses: ...

    def forward(
        self,
        x: Tensor,
        labels_N: Tensor | None = None,
        teacher_DH: Tensor | None = None,
        distilled_D: Tensor | None = None,
        place_N: Tensor | None = None,
    ) -> Tensor | LabelLosses:
        """Compute the losses of labels; without labels, the logits, as models of transformers do.

        A collective of the ranks that share the head.

        Args:
            x: hidden states [..., H]; with labels [N, H], or [U, H] with ``place_N``.
            teacher_DH: the teacher's hidden states at the distilled positions.
            distilled_D: indices of the distilled positions. Every rank passes both or neither.
            place_N: row of ``x`` that predicts each label; only without gradients.

        Returns:
            Losses if labels are given, else logits [..., V], which the model scales and caps.
        """
        if labels_N is None:
            return self._logits(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        if teacher_DH is None or distilled_D is None:
            return LabelLosses(self._cross_entropy(x, labels_N, place_N))
        return self._distillation_losses(x, labels_N, teacher_DH, distilled_D)

    def scaled_logits(self, x_NH: Tensor) -> Tensor:
        """Logits as the model returns them, scaled and capped: fp32 [N, V]; a collective."""
        logits_NV = self(x_NH).float() * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def extra_repr(self) -> str:
        stored = self.weight if self.rows is None else self.rows
        return f"{self.in_features}, {self.out_features}, stored={stored.dtype}"

    def block(self, plan: ExchangePlan | None, device: torch.device) -> VocabBlock:
        """This rank's block if there is a plan to exchange hidden states, else the full weight."""
        if self.rows is None:
            return VocabBlock(self, self.weight, 0, self.scale, self.softcap)
        rows, first = self.rows, 0
        if self._exchange is not None and plan is None:
            gathered = self._gathered
            if gathered is None:
                gathered = self._exchange.gather(rows.to(device))[: self.out_features]
                self._gathered = gathered if self.keeps else None
            rows = gathered
        elif self._exchange is not None:
            first = self._exchange.rank * len(rows)
        rows = rows[: max(0, self.out_features - first)]
        return VocabBlock(self, rows, first, self.scale, self.softcap)

    def _plan_exchange(
        self, x_NH: Tensor, *, needs_gradient: bool, columns: int = 0, num_labels: int = 0
    ) -> ExchangePlan | None:
        """Plan the exchange of hidden states; a collective of the ranks that share the head.

        Args:
            columns: numbers returned to a rank for each of its rows.
            num_labels: labels of this rank if positions are shared, else 0.

        Returns:
            None if gathering the full weight is cheaper.
        """
        exchange = self._exchange
        if exchange is None or self._gathered is not None:
            return None
        facts = torch.tensor([[len(x_NH), int(needs_gradient), num_labels]], device=x_NH.device)
        max_rows, any_gradient, max_labels = exchange.gather(facts).amax(0).tolist()
        numbers = (2 if any_gradient else 1) * exchange.ranks * self.in_features + columns
        moved = max_rows * numbers * x_NH.element_size()
        # Ski-rental rule: exchange until the bytes of the step reach those of one full gather, then
        # gather and keep the weight. At most twice the optimal cost.
        if moved + (self._exchanged_bytes if self.keeps else 0) > self.table_bytes:
            return None
        self._exchanged_bytes += moved
        return ExchangePlan(exchange, len(x_NH), max_rows, bool(any_gradient), max_labels)

    def _logits(self, x_NH: Tensor) -> Tensor:
        plan = None  # the exchanged product has no backward
        if not torch.is_grad_enabled():
            plan = self._plan_exchange(x_NH, needs_gradient=False, columns=self.out_features)
        block = self.block(plan, x_NH.device)
        if plan is None:
            return block.project(x_NH, 0, self.out_features)
        assert self.rows is not None
        logits_NC = block.project(plan.gather(x_NH), block.first, block.stop)
        logits_NR = pad(logits_NC, (0, len(self.rows) - logits_NC.shape[1]))
        counts = [plan.max_rows] * plan.exchange.ranks
        received = plan.exchange.swap(logits_NR, counts, counts)
        by_block = received.view(len(counts), plan.max_rows, -1).transpose(0, 1)
        return by_block.flatten(1)[: len(x_NH), : self.out_features]

    def _cross_entropy(self, x: Tensor, labels_N: Tensor, place_N: Tensor | None = None) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        assert place_N is None or not needs_gradient, "shared positions have no backward"
        num_labels = 0 if place_N is None else len(place_N)
        plan = self._plan_exchange(x, needs_gradient=needs_gradient, num_labels=num_labels)
        block = self.block(plan, x.device)
        loss_N: Tensor = FusedCrossEntropy.apply(x, labels_N, block, plan, needs_gradient, place_N)
        return loss_N

    def _distillation_losses(
        self, hidden_NH: Tensor, labels_N: Tensor, teacher_DH: Tensor, distilled_D: Tensor
    ) -> LabelLosses:
        """KL divergence at the distilled positions, cross-entropy at the others."""
        num_labels, num_distilled = len(labels_N), len(distilled_D)
        # The other positions in order, found by sorting, which does not synchronize with the host.
        is_distilled_N = torch.zeros(num_labels, dtype=torch.int32, device=labels_N.device)
        is_distilled_N = is_distilled_N.index_fill(0, distilled_D, 1)
        rest = is_distilled_N.argsort(stable=True)[: num_labels - num_distilled]
        label_loss = self._cross_entropy(_not_empty(hidden_NH[rest]), _not_empty(labels_N[rest]))

        needs_gradient = torch.is_grad_enabled() and hidden_NH.requires_grad
        student_DH = _not_empty(hidden_NH[distilled_D])
        # The plan counts the bytes of one state and its gradient; ``columns`` adds the other state.
        plan = self._plan_exchange(
            student_DH, needs_gradient=needs_gradient, columns=self.in_features
        )
        kl_D, agrees_D = FusedKL.apply(
            student_DH,
            _not_empty(teacher_DH.detach()),
            self.block(plan, hidden_NH.device),
            plan,
            needs_gradient,
        )
        loss_N = label_loss.new_zeros(num_labels)
        loss_N = loss_N.index_copy(0, rest, label_loss[: len(rest)])
        loss_N = loss_N.index_copy(0, distilled_D, kl_D[:num_distilled])
        agrees_N = torch.zeros_like(loss_N).index_copy(0, distilled_D, agrees_D[:num_distilled])
        return LabelLosses(loss_N, agrees_N)


def _not_empty(rows: Tensor) -> Tensor:
    """The rows, or one row of zeros: a rank without rows must take part in the exchange."""
    return rows if len(rows) else rows.new_zeros(1, *rows.shape[1:])
