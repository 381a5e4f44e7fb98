"""The head, and the loss behind it without ever holding the logits of the whole vocabulary.

The vocabulary is read slice by slice, as flash attention reads keys (online softmax, arXiv
1805.02867): a running maximum, sum and gradient are rescaled as they grow. Forward already finds
what backward needs, d loss / d hidden, so no slice is computed twice and no logits are kept. A head
stored in fewer bits than it computes in is widened one slice at a time, too.

Ranks that share the head hold a block of its rows each. The hidden states of the label positions
travel to the blocks, which takes fewer bytes than the table as long as labels are few; each block's
maximum, sum and gradient are merged as those of slices are. Where labels are many, the table is
gathered instead, once for a whole step if there is memory to keep it.

Several labels may be predicted at one position, as those of candidate targets are. The products
with the vocabulary are then computed once for each position.

Shape letters: N labels, U positions that predict them (N unless positions are shared), H hidden
size, V vocabulary, C columns of one slice of it, G ranks that share the head, M positions of the
rank with the most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, softplus

from trainer.model.layers.fused_kl import taught_losses
from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.quantization import INT8_MAX
from trainer.model.layers.row_exchange import RowExchange

#: Bytes of fp32 logits that exist at a time, and the fewest columns that are worth a product.
LOGITS_BYTES = 64 << 20
MIN_COLUMNS = 1024
#: Stands for the label of a row that is there to make all ranks send as many.
NO_LABEL = -1


class FrozenHead(FrozenLinear):
    """From hidden states to logits, or to losses where the labels are known.

    Attributes:
        weight: Parameter [V, H] until ``hold`` has replaced it by rows.
        rows: buffer after ``hold``: this rank's block of the weight, zeros behind the last row.
        scale: what logits are multiplied by (Cohere).
        softcap: logits pass through ``softcap * tanh(logit / softcap)`` (Gemma 2).
        keeps: a gathered weight stays until ``release``.
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
        self._moved = 0  # bytes that went to blocks since ``release``

    def hold(self, rows: Tensor, exchange: RowExchange | None) -> None:
        """Keep this rank's block in place of the weight; it may lie in host memory.

        Args:
            exchange: the ranks that hold the other blocks; None if this one is all.
        """
        self.register_parameter("weight", None)  # nothing is left for ZeRO-3 to shard and gather
        self.rows, self._exchange = rows, exchange

    def release(self) -> None:
        """Let go of a gathered weight."""
        self._gathered, self._moved = None, 0

    @property
    def table_bytes(self) -> int:
        """Of the weight in full, as it is stored."""
        stored = self.weight if self.rows is None else self.rows
        return self.out_features * self.in_features * stored.element_size()

    def forward(
        self,
        x: Tensor,
        labels_N: Tensor | None = None,
        teacher_DH: Tensor | None = None,
        distilled_D: Tensor | None = None,
        place_N: Tensor | None = None,
    ) -> Tensor:
        """The bare product, for the model to scale or cap; with labels all of that is done here.

        Where ranks share the head, all of them call it together.

        Args:
            x: hidden states [..., H]; with labels [N, H], or [U, H] with ``place_N``.
            teacher_DH, distilled_D: what some positions learn from instead of from their label, and
                which: see ``taught_losses``, which makes [2, N] of it.
            place_N: which of the hidden states predicts each label; only without gradients.

        Returns:
            Without labels [..., V]; with them the negative log-likelihood of each, fp32 [N].
        """
        if labels_N is None:
            return self._logits(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        if teacher_DH is not None and distilled_D is not None:
            limits = LOGITS_BYTES, MIN_COLUMNS
            return taught_losses(self, x, labels_N, teacher_DH, distilled_D, *limits)
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        assert place_N is None or not wants_gradient, "shared positions have no backward"
        nll_N: Tensor = _LabelLosses.apply(x, labels_N, self, wants_gradient, place_N)
        return nll_N

    def extra_repr(self) -> str:
        stored = self.weight if self.rows is None else self.rows
        return f"{self.in_features}, {self.out_features}, stored={stored.dtype}"

    def plan_exchange(
        self, x_NH: Tensor, *, wants_gradient: bool, columns: int = 0, num_labels: int = 0
    ) -> ExchangePlan | None:
        """Agree with the ranks that share the head to send it rows, if that is cheaper.

        Args:
            x_NH: hidden states of this rank.
            columns: logits that come back to a rank for each of its rows.
            num_labels: of this rank, where they are not one for each hidden state.

        Returns:
            None where the weight is read in full instead.
        """
        exchange = self._exchange
        if exchange is None or self._gathered is not None:
            return None
        facts = torch.tensor([[len(x_NH), int(wants_gradient), num_labels]], device=x_NH.device)
        most, any_wants, most_labels = exchange.gather(facts).amax(0).tolist()
        numbers = (2 if any_wants else 1) * exchange.ranks * self.in_features + columns
        moved = most * numbers * x_NH.element_size()
        # To rent until buying had been as cheap costs at most twice what the best choice had.
        if moved + (self._moved if self.keeps else 0) > self.table_bytes:
            return None
        self._moved += moved
        return ExchangePlan(exchange, len(x_NH), most, bool(any_wants), most_labels)

    def block(self) -> VocabBlock:
        """This rank's part of the weight."""
        if self.rows is None:
            return VocabBlock(self, self.weight, 0)
        first = 0 if self._exchange is None else self._exchange.rank * len(self.rows)
        return VocabBlock(self, self.rows[: max(0, self.out_features - first)], first)

    def whole(self, device: torch.device) -> VocabBlock:
        """The weight in full; gathered where this rank holds a part."""
        if self._exchange is None:
            return self.block()
        assert self.rows is not None
        table = self._gathered
        if table is None:
            table = self._exchange.gather(self.rows.to(device))[: self.out_features]
            self._gathered = table if self.keeps else None
        return VocabBlock(self, table, 0)

    def _logits(self, x_NH: Tensor) -> Tensor:
        # A product with blocks knows no backward: nobody asks for one through all logits.
        meeting = None
        if not torch.is_grad_enabled():
            meeting = self.plan_exchange(x_NH, wants_gradient=False, columns=self.out_features)
        if meeting is None:
            whole = self.whole(x_NH.device)
            return whole.project(x_NH, 0, self.out_features)
        block = self.block()
        assert self.rows is not None
        own = block.project(meeting.gather(x_NH), block.first, block.stop)
        own = pad(own, (0, len(self.rows) - own.shape[1]))
        sizes = [meeting.most] * meeting.exchange.ranks
        parts = meeting.exchange.swap(own, sizes, sizes).view(len(sizes), meeting.most, -1)
        return parts.transpose(0, 1).flatten(1)[: len(x_NH), : self.out_features]

    def shape_logits(self, product: Tensor) -> tuple[Tensor, Tensor | float]:
        """Logits, scaled and capped, fp32 and new, and their slope over the product."""
        logits = product.to(torch.float32, copy=True)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is None:
            return logits, self.scale
        tanh = torch.tanh(logits / self.softcap)
        return tanh * self.softcap, (1 - tanh * tanh) * self.scale


@dataclass(frozen=True)
class VocabBlock:
    """Consecutive rows of a head's weight: a part of the vocabulary.

    Attributes:
        rows: [R, H], as stored.
        first: the token id of the first.
    """

    head: FrozenHead
    rows: Tensor
    first: int

    @property
    def stop(self) -> int:
        return self.first + len(self.rows)

    def project(self, x_NH: Tensor, start: int, stop: int) -> Tensor:
        """Logits of token ids ``start`` to ``stop``, bare, in the type of ``x``, [N, C]."""
        if start == stop:  # a rank behind the last row
            return x_NH.new_zeros(len(x_NH), 0)

        def matrix() -> tuple[Tensor, Tensor | None]:
            rows = self.rows[start - self.first : stop - self.first].to(x_NH.device)
            return rows, self._scales(slice(start, stop))

        y_NC = self.head.product(x_NH, matrix)
        bias = self.head.bias
        return y_NC if bias is None else y_NC + bias[start:stop].to(x_NH.dtype)

    def read(self, token_ids: Tensor) -> Tensor:
        """Rows of the weight, fp32 [N, H]."""
        places = (token_ids - self.first).to(self.rows.device)
        rows_NH = self.rows[places].to(token_ids.device).float()
        scales_N = self._scales(token_ids)
        return rows_NH if scales_N is None else rows_NH * scales_N[:, None]

    def _scales(self, token_ids: Tensor | slice) -> Tensor | None:
        absmax = self.head.absmax
        return None if absmax is None else absmax[token_ids] / INT8_MAX


@dataclass(frozen=True)
class ExchangePlan:
    """Ranks that send their rows to each other's blocks.

    Attributes:
        num_rows: of this rank.
        most: of any rank, M: so many are sent by each.
        wants_gradient: some rank does.
        most_labels: of any rank, where they are not one for each row.
    """

    exchange: RowExchange
    num_rows: int
    most: int
    wants_gradient: bool
    most_labels: int = 0

    def gather(self, rows: Tensor, filler: float = 0.0) -> Tensor:
        """All ranks' rows, [G * M, ...]."""
        missing = self.most - len(rows)
        return self.exchange.gather(
            pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing), value=filler)
        )

    def of_labels(self, num_labels: int) -> ExchangePlan:
        """The same ranks, to send one row for each label."""
        return replace(self, num_rows=num_labels, most=self.most_labels)

    def gather_places(self, place_N: Tensor) -> Tensor:
        """Which of all ranks' rows predicts each of all ranks' labels."""
        ranks = torch.arange(self.exchange.ranks, device=place_N.device)
        first = (ranks * self.most).repeat_interleave(self.most_labels)
        return first + self.of_labels(len(place_N)).gather(place_N)

    def own(self, values: Tensor) -> Tensor:
        """This rank's part of [G * M, ...], without what filled it up."""
        start = self.exchange.rank * self.most
        return values[start : start + self.num_rows]


class _LabelLosses(torch.autograd.Function):
    """``softplus(logsumexp of the other logits - logit of the label)`` for every label.

    That is the cross-entropy; kept apart from the others, a likely label loses no digits to
    ``p - 1``, neither in the loss nor in the gradient, whatever the compute type.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        labels_N: Tensor,
        head: FrozenHead,
        wants_gradient: bool,
        place_N: Tensor | None,
    ) -> Tensor:
        num_labels = 0 if place_N is None else len(place_N)
        meeting = head.plan_exchange(
            hidden_NH, wants_gradient=wants_gradient, num_labels=num_labels
        )
        pull_NH = None
        # All ranks agree on it: scoring shares positions, training does not.
        assert meeting is None or bool(meeting.most_labels) == (place_N is not None)
        if meeting is None:
            whole = head.whole(hidden_NH.device)
            scan = _Scan.of(whole, hidden_NH, labels_N, wants_gradient, place_N)
            margin_N = scan.margin()
            pull_NH = scan.pull(margin_N) if wants_gradient else None
        elif place_N is not None:
            sent_UH, of_labels = meeting.gather(hidden_NH), meeting.of_labels(num_labels)
            sent_N, places_N = of_labels.gather(labels_N, NO_LABEL), meeting.gather_places(place_N)
            scan = _Scan.of(head.block(), sent_UH, sent_N, False, places_N)
            scan.merge(meeting.exchange)
            margin_N = of_labels.own(scan.margin())
        else:
            sent_NH, sent_N = meeting.gather(hidden_NH.detach()), meeting.gather(labels_N, NO_LABEL)
            scan = _Scan.of(head.block(), sent_NH, sent_N, meeting.wants_gradient)
            scan.merge(meeting.exchange)
            margin_N = meeting.own(scan.margin())
            if meeting.wants_gradient:
                pull_NH = scan.pull(scan.margin()).to(hidden_NH.dtype)
                pull_NH = meeting.exchange.scatter_sum(pull_NH)[: len(labels_N)]
        if wants_gradient:
            assert pull_NH is not None
            ctx.save_for_backward(pull_NH.to(hidden_NH.dtype))
        return softplus(margin_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (pull_NH,) = ctx.saved_tensors
        return (pull_NH * grad_N[:, None]).to(pull_NH.dtype), None, None, None, None


@dataclass
class _Scan:
    """What a part of the vocabulary adds to the losses of N labels.

    Attributes:
        labels_N: token ids, in this part of the vocabulary or not.
        top_N: the largest logit but the label's; lowest number where there was none.
        total_N: sum over the logits but the label's of ``exp(logit - top)``.
        right_N: the label's logit, 0 where it is not in this part.
        slope_N: its slope over the product.
        pulls_NH: sum over the logits but the label's of ``exp(logit - top) * d logit / d hidden``.
        place_N: which of the hidden states predicts each label; None: there is one for each.
    """

    block: VocabBlock
    labels_N: Tensor
    top_N: Tensor
    total_N: Tensor
    right_N: Tensor
    slope_N: Tensor
    pulls_NH: Tensor | None
    place_N: Tensor | None = None

    @classmethod
    def of(
        cls,
        block: VocabBlock,
        hidden_NH: Tensor,
        labels_N: Tensor,
        wants_gradient: bool,
        place_N: Tensor | None = None,
    ) -> _Scan:
        # Finite, so that a slice with nothing but a label in it subtracts no infinities.
        lowest = torch.finfo(torch.float32).min
        top_N = torch.full_like(labels_N, lowest, dtype=torch.float32)
        zeros_N = torch.zeros_like(top_N)
        slope_N = torch.full_like(top_N, block.head.scale)
        pulls_NH = torch.zeros_like(hidden_NH, dtype=torch.float32) if wants_gradient else None
        scan = cls(block, labels_N, top_N, zeros_N, zeros_N.clone(), slope_N, pulls_NH, place_N)
        columns = max(MIN_COLUMNS, LOGITS_BYTES // (4 * max(1, len(labels_N))))
        for start in range(block.first, block.stop, columns):
            scan._add(hidden_NH, start, min(start + columns, block.stop))
        return scan

    def _add(self, hidden_NH: Tensor, start: int, stop: int) -> None:
        head = self.block.head
        with torch.set_grad_enabled(self.pulls_NH is not None):
            x_NH = hidden_NH.detach().requires_grad_(self.pulls_NH is not None)
            product_NC = self.block.project(x_NH, start, stop)
        logits_NC, slope_NC = head.shape_logits(product_NC.detach())
        if self.place_N is not None:
            logits_NC = logits_NC[self.place_N]
            slope_NC = slope_NC[self.place_N] if isinstance(slope_NC, Tensor) else slope_NC
        # By masks, not by places that are mine: to count those, a GPU and its host would wait.
        mine_N = self._labels_in(start, stop)
        place_N1 = (self.labels_N - start).clamp(0, stop - start - 1)[:, None]
        logit_N = logits_NC.gather(1, place_N1)[:, 0]
        self.right_N = torch.where(mine_N, logit_N, self.right_N)
        if isinstance(slope_NC, Tensor):
            self.slope_N = torch.where(mine_N, slope_NC.gather(1, place_N1)[:, 0], self.slope_N)
        logits_NC.scatter_(1, place_N1, logit_N.masked_fill(mine_N, -torch.inf)[:, None])

        before_N = self.top_N
        self.top_N = torch.maximum(before_N, logits_NC.amax(1))
        shrunk_N = (before_N - self.top_N).exp()
        share_NC = logits_NC.sub_(self.top_N[:, None]).exp_()
        self.total_N = self.total_N * shrunk_N + share_NC.sum(1)
        if self.pulls_NH is not None:
            pulls_NC = share_NC.mul_(slope_NC).to(product_NC.dtype)
            (slice_NH,) = torch.autograd.grad(product_NC, x_NH, pulls_NC)
            self.pulls_NH.mul_(shrunk_N[:, None]).add_(slice_NH)

    def merge(self, exchange: RowExchange) -> None:
        """Make top, total and right those of the whole vocabulary; pulls stay this part's."""
        top_N = exchange.maximum(self.top_N)
        shrunk_N = (self.top_N - top_N).exp()
        if self.pulls_NH is not None:
            self.pulls_NH.mul_(shrunk_N[:, None])
        self.top_N = top_N
        self.total_N, self.right_N = exchange.sum(
            torch.stack([self.total_N * shrunk_N, self.right_N])
        )

    def margin(self) -> Tensor:
        """How far the other logits stand above the label's, fp32 [N]."""
        return self.top_N + self.total_N.log() - self.right_N

    def pull(self, margin_N: Tensor) -> Tensor:
        """This part's share of d loss / d hidden, fp32 [N, H]."""
        assert self.pulls_NH is not None
        pull_NH = self.pulls_NH.div_(self.total_N[:, None])
        first, stop = self.block.first, self.block.stop
        if first < stop:  # not a rank behind the last row
            slope_N1 = (self.slope_N * self._labels_in(first, stop))[:, None]
            near_N = self.labels_N.clamp(first, stop - 1)
            size = max(1, LOGITS_BYTES // (4 * pull_NH.shape[1]))
            parts = (x.split(size) for x in (pull_NH, near_N, slope_N1))
            for part_NH, token_ids, slope in zip(*parts, strict=True):
                part_NH -= self.block.read(token_ids).mul_(slope)
        return pull_NH.mul_(margin_N.sigmoid()[:, None])

    def _labels_in(self, start: int, stop: int) -> Tensor:
        return (self.labels_N >= start) & (self.labels_N < stop)
