"""How well the starts of a prompt fit: the loss of the rows that its first update will read."""

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
from trainer.prompts.evolution import Found
from trainer.tasks.feed import Feed, TaskData
from trainer.tasks.streams import PromptLengths


class Screening:
    """Compares starts by the loss of the rows that the prompt's first update will read.

    No row is read for it that is not trained on anyhow, and it costs a forward for each start. The
    rows follow from the prompt's own settings, and so does what is found.
    """

    def __init__(
        self,
        config: RunConfig,
        tasks: Mapping[str, TaskData],
        evaluator: Evaluator,
        console: Console,
    ) -> None:
        # A feed of its own: the run's begins at the same rows.
        pieces = Feed(config, tasks).next_step([True] * len(config.prompts))
        self._rows = [
            [piece for piece in pieces if piece.prompt == i] for i in range(len(config.prompts))
        ]
        self._names = [prompt.name for prompt in config.prompts]
        self._evaluator, self._console = evaluator, console

    def say(self, i: int, found: Found, text: str) -> None:
        """Tell people what prompt ``i`` starts from."""
        self._console.say(
            f"{self._names[i]}: starts from {found.what}, of {found.tried} starts the one of least "
            f"loss on its first rows ({found.loss:.4f}; the first ones had {found.first:.4f} and "
            f"more, half of them more than {found.middle:.4f}): {text!r}"
        )

    @torch.no_grad()
    def losses(self, starts: Sequence[tuple[int, Tensor]]) -> list[float]:
        """Mean loss per label behind each start, as that of the prompt beside it; a collective.

        Infinite where it is not finite.
        """
        engine, base = self._evaluator.engine, self._evaluator.base
        pieces = [
            replace(row, prompt=n) for n, (i, _) in enumerate(starts) for row in self._rows[i]
        ]
        pieces = [replace(piece, slot=slot) for slot, piece in enumerate(pieces)]
        virtual_tokens = [start.to(engine.device) for _, start in starts]
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
