"""Vocabulary-parallel logits: blocks of the head's rows, exchange of hidden states, sliced softmax.

The vocabulary is processed in slices, as flash attention processes keys (online softmax, arXiv
1805.02867), so the logits of the full vocabulary are never stored. Ranks that share the head hold
one block of its rows each. They all-gather the hidden states of their label positions, scan their
own block, and merge the running maximum and sum of each block.

Shape letters: N positions, H hidden size, C columns of one slice of the vocabulary, R rows of a
block, G ranks that share the head, M positions of the rank with the most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.quantization import INT8_MAX
from trainer.model.layers.row_exchange import RowExchange
from trainer.packing.activation_memory import logit_columns


@dataclass(frozen=True)
class LogitSlice:
    """Logits of one slice of the vocabulary.

    Attributes:
        logits_NC: fp32, scaled and capped; may be overwritten.
        slope_NC: d logit / d product.
        product_NC: hidden states times weight, in the compute type. Only for autograd: its values
            are overwritten with the logits, if those are its memory.
        hidden_NH: leaf that ``product_NC`` was computed from.
    """

    logits_NC: Tensor
    slope_NC: Tensor | float
    product_NC: Tensor
    hidden_NH: Tensor

    def hidden_gradient(self, gradient_NC: Tensor) -> Tensor:
        """Gradient of the hidden states, given that of the logits, which is overwritten."""
        product_gradient_NC = gradient_NC.mul_(self.slope_NC).to(self.product_NC.dtype)
        (gradient_NH,) = torch.autograd.grad(self.product_NC, self.hidden_NH, product_gradient_NC)
        return gradient_NH


@dataclass(frozen=True)
class VocabBlock:
    """Consecutive rows of a head's weight: one part of the vocabulary.

    Attributes:
        head: layer that multiplies, with its bias and row scales for the full vocabulary.
        rows: [R, H], as stored.
        first: token id of the first row.
        scale, softcap: as in ``trainer.model.layers.lm_head.FrozenHead``.
    """

    head: FrozenLinear
    rows: Tensor
    first: int
    scale: float
    softcap: float | None

    @property
    def stop(self) -> int:
        return self.first + len(self.rows)

    def project(self, x_NH: Tensor, start: int, stop: int) -> Tensor:
        """Unscaled logits of token ids ``start`` to ``stop``, in the type of ``x_NH``, [N, C]."""
        if start == stop:  # this rank's block is empty
            return x_NH.new_zeros(len(x_NH), 0)

        def matrix() -> tuple[Tensor, Tensor | None]:
            rows = self.rows[start - self.first : stop - self.first].to(x_NH.device)
            return rows, self._scales(slice(start, stop))

        y_NC = self.head.product(x_NH, matrix)
        bias = self.head.bias
        return y_NC if bias is None else y_NC + bias[start:stop].to(x_NH.dtype)

    def logit_slice(
        self, hidden_NH: Tensor, start: int, stop: int, needs_gradient: bool = False
    ) -> LogitSlice:
        """Scaled and capped logits of token ids ``start`` to ``stop``."""
        with torch.set_grad_enabled(needs_gradient):
            leaf_NH = hidden_NH.detach().requires_grad_(needs_gradient)
            product_NC = self.project(leaf_NH, start, stop)
        logits_NC = product_NC.detach().float()  # backward does not need the product
        slope_NC: Tensor | float = self.scale
        if self.scale != 1.0:
            logits_NC = logits_NC * self.scale
        if self.softcap is not None:
            tanh_NC = torch.tanh(logits_NC / self.softcap)
            logits_NC, slope_NC = tanh_NC * self.softcap, (1 - tanh_NC * tanh_NC) * self.scale
        return LogitSlice(logits_NC, slope_NC, product_NC, leaf_NH)

    def dequantized_rows(self, token_ids: Tensor) -> Tensor:
        """Rows of the weight, fp32 [N, H]."""
        rows_NH = self.rows[(token_ids - self.first).to(self.rows.device)]
        rows_NH = rows_NH.to(token_ids.device).float()
        scales_N = self._scales(token_ids)
        return rows_NH if scales_N is None else rows_NH * scales_N[:, None]

    def _scales(self, token_ids: Tensor | slice) -> Tensor | None:
        absmax = self.head.absmax
        return None if absmax is None else absmax[token_ids] / INT8_MAX


class VocabScan:
    """Online softmax over a block of the vocabulary.

    Attributes:
        top_N: largest logit so far, fp32; the lowest finite number before the first slice.
        total_N: sum of ``exp(logit - top)`` so far, fp32.
    """

    def __init__(self, block: VocabBlock, num_positions: int, device: torch.device) -> None:
        self.block = block
        self._columns = logit_columns(num_positions, device.type == "cpu")
        # Finite, so that a slice whose only column is masked does not subtract infinities.
        lowest = torch.finfo(torch.float32).min
        self.top_N = torch.full((num_positions,), lowest, device=device)
        self.total_N = torch.zeros(num_positions, device=device)

    def slices(self) -> Iterator[tuple[int, int]]:
        """Token ids at which each slice of the block starts and stops."""
        for start in range(self.block.first, self.block.stop, self._columns):
            yield start, min(start + self._columns, self.block.stop)

    def add(self, logits_NC: Tensor, slice_top_N: Tensor) -> Tensor:
        """Add a slice and overwrite its logits with ``exp(logit - top)``.

        Returns:
            Factor [N] to rescale sums over earlier slices with.
        """
        previous_N = self.top_N
        self.top_N = torch.maximum(previous_N, slice_top_N)
        shrink_N = (previous_N - self.top_N).exp()
        self.total_N = self.total_N * shrink_N + logits_NC.sub_(self.top_N[:, None]).exp_().sum(1)
        return shrink_N

    def merge(self, exchange: RowExchange, *sums_N: Tensor) -> tuple[Tensor, list[Tensor]]:
        """All-reduce ``top_N``, ``total_N`` and further sums over the blocks of all ranks.

        Returns:
            Factor [N] to rescale this block's sums with, and the reduced ``sums_N``.
        """
        block_top_N, self.top_N = self.top_N, exchange.maximum(self.top_N)
        shrink_N = (block_top_N - self.top_N).exp()
        self.total_N, *reduced = exchange.sum(torch.stack([self.total_N * shrink_N, *sums_N]))
        return shrink_N, reduced


@dataclass(frozen=True)
class ExchangePlan:
    """Exchange of hidden states among the ranks that share a head; the same on all of them.

    Attributes:
        num_rows: rows of this rank.
        max_rows: rows of the rank with the most, M; every rank sends this many.
        needs_gradient: at least one rank needs gradients.
        max_labels: labels of the rank with the most, if rows and labels differ in number; else 0.
    """

    exchange: RowExchange
    num_rows: int
    max_rows: int
    needs_gradient: bool
    max_labels: int = 0

    def gather(self, rows: Tensor, padding: float = 0.0) -> Tensor:
        """All-gather rows, padded to M per rank: [G * M, ...]."""
        missing = self.max_rows - len(rows)
        padded = pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing), value=padding)
        return self.exchange.gather(padded)

    def for_labels(self, num_labels: int) -> ExchangePlan:
        """The same plan with one row per label."""
        return replace(self, num_rows=num_labels, max_rows=self.max_labels)

    def gather_places(self, place_N: Tensor) -> Tensor:
        """All-gather the index of each label's row, as an index into the gathered rows."""
        ranks = torch.arange(self.exchange.ranks, device=place_N.device)
        first = (ranks * self.max_rows).repeat_interleave(self.max_labels)
        return first + self.for_labels(len(place_N)).gather(place_N)

    def own(self, values: Tensor) -> Tensor:
        """This rank's values of [G * M, ...], without padding."""
        start = self.exchange.rank * self.max_rows
        return values[start : start + self.num_rows]

    def scatter_sum(self, values: Tensor) -> Tensor:
        """Reduce-scatter [G * M, ...]: this rank's rows of the sum, without padding."""
        return self.exchange.scatter_sum(values)[: self.num_rows]
