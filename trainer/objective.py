"""From a stream to each prompt's share of the objective.

Shape letters: N label positions, K prompts of the bank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.engine import Engine
from trainer.prefetch import Batch, Rank, prepare
from trainer.tasks.streams import Piece, Stream


def label_counts(pieces: Sequence[Piece], num_prompts: int) -> list[int]:
    """Label tokens of each prompt among these pieces, [K]: known to all ranks before a forward."""
    counts = [0] * num_prompts
    for piece in pieces:
        if piece.prompt is not None and not piece.filler:
            counts[piece.prompt] += piece.example.num_labels
    return counts


def stream_objective(
    base: nn.Module, stream: Stream, virtual_tokens: Sequence[Tensor], counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """This stream's part of ``sum over k of (mean cross-entropy per label token of prompt k)``.

    Args:
        counts: label tokens of each prompt in the whole step, over all ranks and streams, [K].
            Dividing by them here makes every split of a step give the same gradient, and makes each
            prompt's gradient independent of the others'.

    Returns:
        The scalar to differentiate, and the loss sums of each prompt, detached, fp32 [K].
    """
    nll_N = base(stream, virtual_tokens)
    weight_N = (stream.label_slot_N >= 0).to(nll_N.dtype)
    inverse_K = torch.tensor([1.0 / count if count else 0.0 for count in counts])
    inverse_N = inverse_K.to(nll_N.device)[stream.label_prompt_N]
    sums_K = torch.zeros(len(counts), device=nll_N.device)
    sums_K.index_add_(0, stream.label_prompt_N, (nll_N * weight_N).detach())
    return (nll_N * weight_N * inverse_N).sum(), sums_K


@dataclass(frozen=True)
class StepResult:
    """What one step found, equal on all ranks.

    Attributes:
        losses: mean cross-entropy per label token of each prompt; NaN where it read no rows.
        gradients: d loss / d virtual tokens, [P, H] per prompt, summed over ranks; None where it
            read no rows, or where loss or gradient is not finite on any rank.
        skipped: prompts whose update is left out because something was not finite.
        useful_tokens: text tokens the base read, over all ranks.
    """

    losses: list[float]
    gradients: list[Tensor | None]
    skipped: list[bool]
    useful_tokens: int


def step_gradients(
    engine: Engine,
    base: nn.Module,
    pieces: Sequence[Piece],
    virtual_tokens: Sequence[Tensor],
    max_tokens: int,
) -> StepResult:
    """``batch_gradients`` of rows that were not prepared ahead."""
    lengths = [prompt.shape[0] for prompt in virtual_tokens]
    rank = Rank(engine.rank, engine.world_size, engine.device)
    batch = prepare(list(pieces), lengths, rank, max_tokens)
    return batch_gradients(engine, base, batch, virtual_tokens)


def batch_gradients(
    engine: Engine, base: nn.Module, batch: Batch, virtual_tokens: Sequence[Tensor]
) -> StepResult:
    """Forward and backward over this rank's streams of a step, and the sum over ranks.

    Sums carry NaN from any rank to all, so all leave out the same updates without another word.
    """
    leaves = [prompt.detach().requires_grad_() for prompt in virtual_tokens]
    counts = label_counts(batch.pieces, len(leaves))
    sums_K = torch.zeros(len(leaves), device=engine.device)
    for stream in batch.streams:
        stream = stream.to(engine.device)
        objective, stream_sums_K = stream_objective(base, stream, leaves, counts)
        objective.backward()
        sums_K += stream_sums_K
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    engine.all_reduce_sum([sums_K, *gradients])
    engine.end_step()

    losses = [s / n if n else math.nan for s, n in zip(sums_K.tolist(), counts, strict=True)]
    finite = [
        math.isfinite(loss) and bool(gradient.isfinite().all())
        for loss, gradient in zip(losses, gradients, strict=True)
    ]
    return StepResult(
        losses=losses,
        gradients=[g if ok else None for g, ok in zip(gradients, finite, strict=True)],
        skipped=[count > 0 and not ok for count, ok in zip(counts, finite, strict=True)],
        useful_tokens=sum(piece.example.num_tokens for piece in batch.pieces),
    )
