"""Rows of input and target -> token ids, within the context. Needs a tokenizer, but no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import Task
from trainer.data.row_validation import render
from trainer.data.token_table import Example, TokenBlock
from trainer.data.tokenization.report import BEHIND_PROMPT, TokenizationReport, too_long
from trainer.data.tokenization.tokenizer import TextTokenizer
from trainer.runtime.errors import BadInput


class TextRowTokenizer:
    """Puts inputs and targets together, within ``max_length``, by the policy of the task.

    Args:
        choices: the targets that every row is tried with; None: each has its own.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        max_length: int,
        prefix: str,
        choices: Sequence[str] | None = None,
    ) -> None:
        self.task, self.max_length = task, max_length
        self.prefix, self.choices = prefix, choices
        self.encoder = TextTokenizer(tokenizer)
        self.eos = self._eos(tokenizer)
        self.limit = BEHIND_PROMPT
        if prefix:
            self.limit = f"with tasks.{task.name}.hand_written {prefix!r} in front"
        # What may stand in front of a row's own text, which is never cut: BOS and the hard prompt,
        # whose last space often belongs to the token after it.
        self.fronts = [self.encoder.front]
        if prefix:
            self.fronts = self.encoder.inputs([prefix, prefix.rstrip()])
        if max_length < 2:
            raise BadInput(
                f"prompts of task {task.name!r}: num_virtual_tokens leaves {max(0, max_length)} "
                f"tokens of the base's context for text; use fewer virtual tokens"
            )

    def _eos(self, tokenizer: Any) -> list[int]:
        if not self.task.append_eos:
            return []
        if tokenizer.eos_token_id is None:
            setting = f"tasks.{self.task.name}.append_eos"
            raise BadInput(f"{setting}: true, but the tokenizer has no EOS token; set it to false")
        return [tokenizer.eos_token_id]

    def check_choices(self, row: Mapping[str, Any]) -> None:
        """Refuse choices that the base cannot tell apart.

        Args:
            row: one whose input they continue.

        Raises:
            BadInput: a choice gives no tokens, or two give the same.
        """
        (_, targets, _), *_ = self._encoded([row])
        problem = _problem_of_choices(self.task, targets)
        if problem:
            raise BadInput(f"tasks.{self.task.name}.choices: {problem}; use other words")

    def __call__(
        self, first: int, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[TokenBlock, TokenizationReport]:
        """Examples of consecutive rows, the first of which has the number ``first``."""
        found, examples = TokenizationReport(len(rows)), list[Example]()
        for row, (input_ids, targets, merged) in enumerate(self._encoded(rows), start=first):
            fitted = self._fit(row, input_ids, targets, found)
            examples += fitted
            if merged and fitted:
                found.merge(row)
        return TokenBlock.of(examples), found

    def _encoded(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> list[tuple[list[int], list[list[int]], bool]]:
        """Of every row: ids of its input, ids of its targets, and whether any of them merges."""
        texts = [self.prefix + render(self.task.input, row) for row in rows]
        inputs = self.encoder.inputs(texts)
        if not self.task.target:
            return [(ids, [[]], False) for ids in inputs]
        if self.choices is None:
            choices = [[render(self.task.target, row)] for row in rows]
        else:
            choices = [list(self.choices)] * len(rows)
        width = len(choices[0])
        targets, merged = self.encoder.targets(
            [text for text in texts for _ in range(width)],
            [ids for ids in inputs for _ in range(width)],
            [target for own in choices for target in own],
        )
        parts = [slice(i * width, (i + 1) * width) for i in range(len(rows))]
        return [
            (ids, targets[part], any(merged[part])) for ids, part in zip(inputs, parts, strict=True)
        ]

    def _fit(
        self, row: int, input_ids: list[int], targets: list[list[int]], found: TokenizationReport
    ) -> list[Example]:
        """One example per target, all behind the same input; none if the row is left out."""
        room = self.max_length - max(map(len, targets)) - len(self.eos)
        front = self._front(input_ids)
        same = _problem_of_choices(self.task, targets) if self.choices is not None else None
        if self.task.target and not all(targets):
            found.problem(row, "its target gives no tokens; the tokenizer drops this text")
        elif same:
            found.problem(row, f"behind its input {same}; change the input or use other words")
        elif len(input_ids) <= len(self.encoder.front):
            found.problem(row, "its input gives no tokens; the tokenizer drops this text")
        elif not self.task.target and len(input_ids) + len(self.eos) < len(front) + 2:
            found.problem(row, "has one token and no EOS: nothing to predict; leave the row out")
        elif len(input_ids) <= room:
            return self._examples(row, input_ids, targets, len(front))
        elif self.task.too_long == "skip":
            found.skipped += 1
        elif self.task.too_long == "refuse":
            found.problem(row, too_long(len(input_ids) + self.max_length - room, self))
        elif room <= len(front):
            found.problem(
                row,
                f"its target alone has {self.max_length - room} tokens; {self.max_length} fit, "
                f"with what must stand before it; a target is never cut: shorten it, or set "
                f"tasks.{self.task.name}.too_long to skip",
            )
        else:
            found.truncated += 1
            own = room - len(front)
            return self._examples(row, front + input_ids[-own:], targets, len(front))
        return []

    def _front(self, input_ids: list[int]) -> list[int]:
        """The tokens of a row that are never cut."""
        begins = (front for front in self.fronts if input_ids[: len(front)] == front)
        return next(begins, self.fronts[0])

    def _examples(
        self, row: int, ids: list[int], targets: list[list[int]], num_front: int
    ) -> list[Example]:
        # Without a target each token of the text is to be predicted by those before it.
        start = len(ids) if self.task.target else num_front + 1
        return [Example.with_target((*ids, *target, *self.eos), start, row) for target in targets]


def _problem_of_choices(task: Task, targets: list[list[int]]) -> str | None:
    """What keeps the base from telling the choices of a task apart by their tokens, or None."""
    assert task.choices is not None
    first: dict[tuple[int, ...], str] = {}
    for choice, target in zip(task.choices, targets, strict=True):
        if not target:
            return f"{choice!r} gives no tokens with this tokenizer"
        other = first.setdefault(tuple(target), choice)
        if other != choice:
            return (
                f"{other!r} and {choice!r} give the same tokens: this base cannot tell them apart"
            )
    return None
