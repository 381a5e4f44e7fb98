"""Forward and backward of one training step: each prompt's loss and gradient.

Shape letters: N label positions, K prompts of the bank.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.prefetch import RankInfo, StepBatch, prepare_batch, prepare_step
from trainer.model.prompted_model import read_teacher
from trainer.packing.packed_batch import PackedBatch
from trainer.packing.packed_row import PackedRow
from trainer.prompts.soft_prompt import SoftPrompt, prompt_lengths
from trainer.runtime import stop_signals
from trainer.training.saved_tensors import SavedBytes


def label_counts(rows: Sequence[PackedRow], num_prompts: int) -> list[int]:
    """Return the number of label tokens of each prompt in these rows, [K]."""
    counts = [0] * num_prompts
    for row in rows:
        if row.prompt is not None and not row.is_padding:
            counts[row.prompt] += row.example.num_labels
    return counts


def text_counts(rows: Sequence[PackedRow], num_prompts: int) -> list[int]:
    """Return the number of useful tokens that each prompt reads in these rows, [K].

    Tokens of the rows. Fixed text of a prompt's segment, which a packed batch reads once for all
    rows, is not counted; neither are virtual tokens.
    """
    counts = [0] * num_prompts
    for row in rows:
        assert row.prompt is not None
        counts[row.prompt] += row.num_tokens
    return counts


def batch_objective(
    base: nn.Module,
    batch: PackedBatch,
    virtual_tokens: Sequence[SoftPrompt],
    counts: Sequence[int],
    teacher_DH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return a batch's part of ``sum over k of (mean loss per label token of prompt k)``.

    The loss is the cross-entropy or, with a teacher, the divergence from its distribution.

    Args:
        counts: label tokens of each prompt in the whole step, over all ranks and packed batches,
            [K]. Dividing by these counts makes the gradient of each prompt independent of how a
            step is split into batches and of the other prompts.
        teacher_DH: result of ``read_teacher``.

    Returns:
        The scalar to differentiate, and the loss sums of each prompt, detached, fp32 [K].
    """
    loss_N = base(batch, virtual_tokens, teacher_DH).losses.loss_N
    weight_N = (batch.label_slot_N >= 0).to(loss_N.dtype)
    inverse_K = torch.tensor([1.0 / count if count else 0.0 for count in counts])
    # Copied asynchronously, without waiting for the device's earlier work.
    inverse_N = inverse_K.to(loss_N.device, non_blocking=True)[batch.label_prompt_N]
    sums_K = torch.zeros(len(counts), device=loss_N.device)
    sums_K.index_add_(0, batch.label_prompt_N, (loss_N * weight_N).detach())
    return (loss_N * weight_N * inverse_N).sum(), sums_K


@dataclass(frozen=True)
class StepResult:
    """Result of one step, equal on all ranks except for the lengths of packed batches.

    Attributes:
        losses: mean loss per label token of each prompt, cross-entropy or divergence from its
            teacher; NaN for prompts without rows.
        gradients: d loss / d virtual tokens of each prompt, summed over ranks; None for prompts
            without rows, or if loss or gradient is not finite on any rank.
        skipped: whether the update of each prompt is skipped because of a non-finite number.
        tokens: useful tokens that the base read for each prompt, over all ranks.
        longest_batch, first_batch: tokens of the longest and the first packed batch of this rank.
        splits: packed batches that did not fit and were split in two, over all ranks.
        stopping: a rank received a stop signal.
    """

    losses: list[float]
    gradients: list[Tensor | None]
    skipped: list[bool]
    tokens: list[int]
    longest_batch: int
    first_batch: int
    splits: int
    stopping: bool

    @property
    def useful_tokens(self) -> int:
        return sum(self.tokens)


class OutOfMemory(RuntimeError):
    """A packed batch did not fit into memory and cannot be split."""


def step_gradients(
    engine: Engine,
    base: nn.Module,
    rows: Sequence[PackedRow],
    virtual_tokens: Sequence[SoftPrompt],
    max_tokens: int,
    teachers: Sequence[SoftPrompt] = (),
) -> StepResult:
    """Pack rows and call ``batch_gradients``."""
    lengths = prompt_lengths(virtual_tokens)
    rank = RankInfo(engine.rank, engine.world_size, engine.device)
    step_batch = prepare_step(list(rows), lengths, rank, max_tokens)
    return batch_gradients(engine, base, step_batch, virtual_tokens, teachers=teachers)


def batch_gradients(
    engine: Engine,
    base: nn.Module,
    step_batch: StepBatch,
    virtual_tokens: Sequence[SoftPrompt],
    saved: SavedBytes | None = None,
    teachers: Sequence[SoftPrompt] = (),
) -> StepResult:
    """Run forward and backward over this rank's packed batches, and all-reduce the results.

    The sums propagate a NaN of any rank to all ranks, so that all skip the same updates.

    Args:
        saved: counts the bytes that the first packed batch's forward saves.

    Raises:
        OutOfMemory: if a packed batch does not fit and cannot be split, because it is one row or
            other ranks take part in its gathers.
    """
    leaves = [prompt.leaf() for prompt in virtual_tokens]
    counts = label_counts(step_batch.rows, len(leaves))
    sums = _StepSums(engine, leaves, teachers)
    remaining = deque(zip(step_batch.plan, step_batch.batches, strict=True))
    while remaining:
        rows, batch = remaining.popleft()
        failure = sums.add(base, batch.to(engine.device), counts, saved)
        saved = None
        if failure is None:
            engine.note_trained_batch()
            continue
        half, tokens = len(rows) // 2, len(batch.token_ids_T)
        if not engine.recover_from_oom() or not half:
            raise OutOfMemory(
                f"rank {engine.rank}: a packed batch of {tokens} tokens does not fit ({failure}); "
                f"set training.micro_batch_tokens={max(1, tokens // 2)}, "
                "or engine.gradient_checkpointing=true"
            )
        sums.splits += 1
        lengths = prompt_lengths(leaves)
        for part in (rows[half:], rows[:half]):
            distilled = batch.teacher is not None
            half_batch = prepare_batch(part, lengths, engine.device, distilled=distilled)
            remaining.appendleft((part, half_batch))
    # Prompts without rows, such as stopped ones, have no gradient on any rank.
    reduced = [g for g, count in zip(sums.gradients, counts, strict=True) if count]
    stops = torch.full_like(sums.splits, float(stop_signals.stop_requested()))
    engine.all_reduce_sum([sums.losses_K, sums.splits, stops, *reduced])
    engine.end_step()

    # One transfer, so that the host waits for the device only once.
    finite_K = torch.stack([gradient.isfinite().all() for gradient in sums.gradients]).to(stops)
    *numbers, splits, stopping = torch.cat([sums.losses_K, finite_K, sums.splits, stops]).tolist()
    totals, all_finite = numbers[: len(counts)], numbers[len(counts) :]
    losses = [total / n if n else math.nan for total, n in zip(totals, counts, strict=True)]
    finite = [math.isfinite(loss) and bool(ok) for loss, ok in zip(losses, all_finite, strict=True)]
    return StepResult(
        losses=losses,
        gradients=[g if ok else None for g, ok in zip(sums.gradients, finite, strict=True)],
        skipped=[count > 0 and not ok for count, ok in zip(counts, finite, strict=True)],
        tokens=text_counts(step_batch.rows, len(leaves)),
        longest_batch=max(len(batch.token_ids_T) for batch in step_batch.batches),
        first_batch=len(step_batch.batches[0].token_ids_T),
        splits=int(splits),
        stopping=bool(stopping),
    )


class _StepSums:
    """Losses and gradients of each prompt, summed over a step's packed batches on this rank."""

    def __init__(
        self, engine: Engine, leaves: Sequence[SoftPrompt], teachers: Sequence[SoftPrompt]
    ) -> None:
        self._leaves, self._teachers = leaves, teachers
        self._tensors = [leaf.tensor for leaf in leaves]
        self.losses_K = torch.zeros(len(leaves), device=engine.device)
        self.gradients = [torch.zeros_like(tensor) for tensor in self._tensors]
        self.splits = torch.zeros(1, device=engine.device)

    def add(
        self, base: nn.Module, batch: PackedBatch, counts: Sequence[int], saved: SavedBytes | None
    ) -> str | None:
        """Add a packed batch; if memory runs out, add nothing and return the reason."""
        try:
            teacher_DH = read_teacher(base, batch, self._teachers)
            with saved or nullcontext():
                objective, losses_K = batch_objective(base, batch, self._leaves, counts, teacher_DH)
            gradients = torch.autograd.grad(objective, self._tensors, allow_unused=True)
        except torch.OutOfMemoryError as error:
            return str(error).split(". ")[0]
        self.losses_K += losses_K
        for total, gradient in zip(self.gradients, gradients, strict=True):
            if gradient is not None:
                total += gradient
        return None
