"""Which of several starts a prompt takes: the one that fits the rows of its first update best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainer.config import RunConfig
from trainer.console import Console
from trainer.evaluation import Evaluator
from trainer.objective import label_counts, read_teacher, stream_objective
from trainer.prefetch import Rank, prepare
from trainer.tasks.feed import Feed, TaskData
from trainer.tasks.streams import PromptLengths


class Screening:
    """Compares starts by the loss of the rows that the prompt's first update will read.

    No row is read for it that is not trained on anyhow, and it costs a forward for each start. The
    rows follow from the prompt's own settings, and so does what is chosen.
    """

    def __init__(
        self,
        config: RunConfig,
        tasks: Mapping[str, TaskData],
        evaluator: Evaluator,
        console: Console,
    ) -> None:
        # A feed of its own: the run's begins at the same rows.
        self._pieces = Feed(config, tasks).next_step([True] * len(config.prompts))
        self._names = [prompt.name for prompt in config.prompts]
        self._evaluator, self._console = evaluator, console

    def choose(self, i: int, starts: Sequence[tuple[str, Tensor]]) -> Tensor:
        """Of starts and what they are, the one of least loss for prompt ``i``; on all ranks."""
        losses = self._losses(i, [start for _, start in starts])
        best = min(range(len(starts)), key=lambda n: (losses[n], n))
        self._console.say(
            f"{self._names[i]}: starts from {starts[best][0]}, of {len(starts)} starts the one of "
            f"least loss on its first rows ({losses[best]:.4f}; in the middle of them "
            f"{sorted(losses)[len(losses) // 2]:.4f})"
        )
        return starts[best][1]

    @torch.no_grad()
    def _losses(self, i: int, starts: Sequence[Tensor]) -> list[float]:
        """Mean loss per label behind each start: infinite where it is not finite."""
        engine, base = self._evaluator.engine, self._evaluator.base
        rows = [piece for piece in self._pieces if piece.prompt == i]
        pieces = [replace(row, prompt=n) for n in range(len(starts)) for row in rows]
        pieces = [replace(piece, slot=slot) for slot, piece in enumerate(pieces)]
        virtual_tokens = [start.to(engine.device) for start in starts]
        counts = label_counts(pieces, len(starts))
        rank = Rank(engine.rank, engine.world_size, engine.device)
        lengths = PromptLengths.of(virtual_tokens)
        total_K = torch.zeros(len(starts), device=engine.device)
        for host in prepare(pieces, lengths, rank, self._evaluator.budget.tokens).streams:
            stream = host.to(engine.device)
            teacher_DH = read_teacher(base, stream, self._evaluator.teachers)
            total_K += stream_objective(base, stream, virtual_tokens, counts, teacher_DH)[1]
        engine.all_reduce_sum([total_K])
        engine.end_step()
        losses = [total / count for total, count in zip(total_K.tolist(), counts, strict=True)]
        return [loss if math.isfinite(loss) else math.inf for loss in losses]
