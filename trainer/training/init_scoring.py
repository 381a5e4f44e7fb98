"""Scores candidates for initial prompts by the loss on the rows of the first update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from trainer.config import RunConfig
from trainer.data.task_data import TaskData
from trainer.distributed.prefetch import RankInfo, StepBatch, prefetched, prepare_step
from trainer.evaluation.evaluator import Evaluator
from trainer.model.prompted_model import read_teacher
from trainer.packing.batch_source import BatchSource
from trainer.packing.packed_row import PackedRow, PromptLengths
from trainer.packing.planning import portions
from trainer.prompts.init_search import SearchResult, Unsearched, Words
from trainer.prompts.soft_prompt import VirtualTokens
from trainer.runtime.console import Console
from trainer.training.step import batch_objective, label_counts
from trainer.training.validation_report import SWEEP

#: Share of the token budget that a portion of candidates fills, because rows do not divide evenly.
FILLED = 0.95
#: Candidates, each with the index of the prompt whose rows score it.
Portion = list[tuple[int, Words]]


class LossInitScorer:
    """Compares candidates by the loss of the rows that the prompt's first update will read.

    Each candidate costs one forward pass over these rows. The rows, and therefore the result,
    depend only on the prompt's own settings.

    Args:
        before: as in ``Bank``.
    """

    def __init__(
        self,
        config: RunConfig,
        tasks: Mapping[str, TaskData],
        evaluator: Evaluator,
        console: Console,
        before: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        # A separate source, because that of the run must still begin at the same rows.
        rows = BatchSource(config, tasks).next_step([True] * len(config.prompts))
        self._rows = [[row for row in rows if row.prompt == i] for i in range(len(config.prompts))]
        self._names = [prompt.name for prompt in config.prompts]
        self._before = [tuple((before or {}).get(name, ())) for name in self._names]
        self._steps = [config.prompt_steps(prompt) for prompt in config.prompts]
        self._evaluator, self._console = evaluator, console
        self._advance: Callable[[int], None] = lambda rows: None

    @contextmanager
    def working(self, asked: Mapping[int, int]) -> Iterator[None]:
        """Show the progress of the search; ``asked`` is the number of candidates by prompt."""
        num_rows = sum(count * len(self._rows[i]) for i, count in asked.items())
        number, steps = sum(asked.values()), sum(self._steps[i] for i in asked)
        self._console.print(
            f"init: auto compares initial prompts: {number} candidates on {num_rows:,} rows, "
            f"{number / (2 * steps):.0%} of the training FLOPs of {len(asked)} prompt(s)"
        )
        with self._console.working("searching for an initial prompt", num_rows) as self._advance:
            yield

    def say(self, i: int, best: SearchResult | Unsearched, text: str) -> None:
        """Print the initial prompt of prompt ``i``; in a run with many prompts a detail."""
        show = self._console.print if len(self._names) < SWEEP else self._console.detail
        head = f"{self._names[i]}: starts from {best.what}"
        if isinstance(best, Unsearched):
            show(f"{head}: {text!r}" + (f" ({best.why})" if best.why else ""))
            return
        search = f"; before the genetic search: best {best.first:.4f}, median {best.middle:.4f}"
        show(
            f"{head}, the best of {best.tried} candidates on its first rows (loss {best.loss:.4f}"
            f"{search if best.rounds else ''}): {text!r}"
        )

    @torch.no_grad()
    def losses(
        self, starts: Sequence[tuple[int, Words]], embed: Callable[[Sequence[int]], Tensor]
    ) -> list[float]:
        """Return the mean loss per label with each candidate as prompt; a collective.

        Non-finite losses are returned as infinity. Candidates are scored in portions that fill a
        packed batch of every rank, so that only one portion is in memory.

        Args:
            starts: index of the prompt whose rows are read, and token ids, of each candidate.
            embed: returns embeddings [n, H] of token ids; may be a collective.
        """
        engine = self._evaluator.engine
        starts = [(i, (*self._before[i], *words)) for i, words in starts]
        totals = torch.zeros(len(starts), dtype=torch.float64, device=engine.device)
        counts: list[int] = []
        for portion, rows, batch in prefetched(self._prepared, self._portions(starts)):
            embedded = embed([word for _, words in portion for word in words])
            lengths = [len(words) for _, words in portion]
            candidates = [VirtualTokens(tensor) for tensor in embedded.split(lengths)]
            scored = slice(len(counts), len(counts) + len(portion))
            counts += (own := label_counts(rows, len(portion)))
            totals[scored] = self._totals(batch, candidates, own)
            self._advance(len(rows))
        engine.all_reduce_sum([totals])
        engine.end_step()
        losses = [total / count for total, count in zip(totals.tolist(), counts, strict=True)]
        return [loss if math.isfinite(loss) else math.inf for loss in losses]

    def _portions(self, starts: Sequence[tuple[int, Words]]) -> Iterator[Portion]:
        most = FILLED * self._evaluator.budget.tokens * self._evaluator.engine.world_size

        def num_tokens(start: tuple[int, Words]) -> int:
            i, words = start
            return len(words) + sum(row.num_tokens for row in self._rows[i])

        return portions(starts, num_tokens, most)

    def _prepared(self, portion: Portion) -> tuple[Portion, list[PackedRow], StepBatch]:
        """Pack the rows of every candidate's prompt, with the candidate as their prompt."""
        engine = self._evaluator.engine
        pairs = [(n, row) for n, (i, _) in enumerate(portion) for row in self._rows[i]]
        rows = [replace(row, prompt=n, slot=slot) for slot, (n, row) in enumerate(pairs)]
        lengths = PromptLengths(tuple(len(words) for _, words in portion), (0,) * len(portion))
        rank = RankInfo(engine.rank, engine.world_size, engine.device)
        return portion, rows, prepare_step(rows, lengths, rank, self._evaluator.budget.tokens)

    def _totals(
        self, step_batch: StepBatch, virtual_tokens: Sequence[VirtualTokens], counts: Sequence[int]
    ) -> Tensor:
        """Return the summed loss of this rank's labels for each candidate, in float64."""
        engine, base = self._evaluator.engine, self._evaluator.base
        on_device = [start.to(engine.device) for start in virtual_tokens]
        totals = torch.zeros(len(on_device), dtype=torch.float64, device=engine.device)
        for host in step_batch.batches:
            batch = host.to(engine.device)
            teacher_DH = read_teacher(base, batch, self._evaluator.teachers)
            totals += batch_objective(base, batch, on_device, counts, teacher_DH)[1]
        return totals
