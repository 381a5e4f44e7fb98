"""The rows of one rank: requests with different prompts, decoded together.

Shape letters: B rows, L longest input, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.evaluation.token_sampling import Sampling, ScoredToken, TokenChooser
from trainer.model.attention.batch_cache import BatchCache
from trainer.model.decode_step import DecodeStep
from trainer.model.prompted_model import PromptedBase
from trainer.prompts.soft_prompt import SoftPrompt


@dataclass(frozen=True)
class Join:
    """A row that joins the batch of a rank: the part of a request that ranks need.

    Attributes:
        number: identifies the row among those of all ranks.
        prompt: index of the prompt; None: without a prompt.
    """

    number: int
    rank: int
    input_ids: tuple[int, ...]
    prompt: int | None
    prompt_at: int
    max_new_tokens: int
    sampling: Sampling


class _Row:
    def __init__(self, join: Join, base: PromptedBase, device: torch.device) -> None:
        self.number, self.ids = join.number, list(join.input_ids)
        self._chooser = TokenChooser(
            base.model, join.input_ids, join.max_new_tokens, join.sampling, device
        )

    def choose(self, logits_V: Tensor, largest: int) -> ScoredToken:
        """Choose the next token, and append it to the row. ``largest`` has the largest logit."""
        token = self._chooser.choose(self.ids, logits_V, largest)
        self.ids.append(token.token_id)
        return token


class DecodingBatch:
    """All rows that one rank decodes.

    Each forward pass either reads the rows that join, or decodes one token of every row. All ranks
    run the same number of forward passes, because each gathers the sharded layers.
    """

    def __init__(
        self, base: PromptedBase, prompts: Sequence[SoftPrompt], device: torch.device
    ) -> None:
        self._base, self._prompts, self._device = base, prompts, device
        self._rows: list[_Row] = []
        self._cache = BatchCache()

    def __len__(self) -> int:
        return len(self._rows)

    def remove(self, number: int) -> None:
        """Remove a row; ignore it if it is on another rank."""
        place = next((i for i, row in enumerate(self._rows) if row.number == number), None)
        if place is not None:
            self._cache.remove(place)
            self._rows[place] = self._rows[-1]
            self._rows.pop()

    @torch.no_grad()
    def forward(self, joins: Sequence[Join]) -> dict[int, ScoredToken]:
        """Run one forward pass: read the joining rows, or else decode one token of every row.

        Returns:
            The next token of each row of the pass, by its number.
        """
        if joins:
            rows, logits_BV = self._read(joins)
        elif self._rows:
            rows, logits_BV = self._rows, self._decode()
        else:
            self._idle()
            return {}
        largest = logits_BV.argmax(-1).tolist()
        chosen = zip(rows, logits_BV, largest, strict=True)
        return {row.number: row.choose(logits_V, token) for row, logits_V, token in chosen}

    def _read(self, joins: Sequence[Join]) -> tuple[list[_Row], Tensor]:
        rows = [_Row(join, self._base, self._device) for join in joins]
        lengths = [len(join.input_ids) + self._num_virtual(join) for join in joins]
        longest, width = max(len(join.input_ids) for join in joins), max(lengths)
        ids_BL = [[0] * (longest - len(join.input_ids)) + list(join.input_ids) for join in joins]
        mask_BT = [[0] * (width - length) + [1] * length for length in lengths]
        cache = self._base.new_cache()
        step = DecodeStep(
            torch.tensor(ids_BL, device=self._device),
            torch.tensor(mask_BT, device=self._device),
            cache,
            [join.prompt_at for join in joins],
            [join.prompt for join in joins],
        )
        logits_BV = self._run(step, self._prompts)
        self._cache.add(cache, lengths)
        self._rows += rows
        return rows, logits_BV

    def _decode(self) -> Tensor:
        last_B1 = torch.tensor([row.ids[-1:] for row in self._rows], device=self._device)
        logits_BV = self._run(DecodeStep(last_B1, self._cache.mask(self._device), self._cache))
        self._cache.note_step()
        return logits_BV

    def _idle(self) -> None:
        """Gather the layers for the other ranks."""
        ids_11 = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        self._run(DecodeStep(ids_11, torch.ones_like(ids_11), self._base.new_cache()))

    def _run(self, step: DecodeStep, prompts: Sequence[SoftPrompt] = ()) -> Tensor:
        result: Any = self._base(step, prompts)
        logits_BV: Tensor = result.logits_BV
        return logits_BV

    def _num_virtual(self, join: Join) -> int:
        return 0 if join.prompt is None else self._prompts[join.prompt].num_virtual_tokens
