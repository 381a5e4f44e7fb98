"""Rows of input and target -> examples within the context. Needs a tokenizer, but no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import Task
from trainer.data.row_validation import render
from trainer.data.token_table import Example
from trainer.data.tokenization.row_tokenizer import RowTokenizer, TokenizationReport
from trainer.data.tokenization.tokenizer import TextTokenizer
from trainer.runtime.errors import BadInput


class TextRowTokenizer(RowTokenizer):
    """Tokenizes rows of input and target; truncation cuts the input on the left.

    Args:
        prefix: a hard prompt before every input.
        choices: the candidate targets of every row; None: each row has its own target.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        max_length: int,
        prefix: str,
        choices: Sequence[str] | None = None,
    ) -> None:
        super().__init__(task, max_length)
        self.prefix, self.choices = prefix, choices
        self.encoder = TextTokenizer(tokenizer)
        self.eos = self._eos(tokenizer)
        # Tokens before a row's own text, which are never cut: BOS and the hard prompt, with and
        # without trailing white space, which often belongs to the following token.
        self.fronts = [self.encoder.front]
        if prefix:
            self.limit = f"with tasks.{task.name}.hand_written {prefix!r} before it"
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
        """Raise ``BadInput`` if choices have equal tokens, or none, after the input of a row."""
        (_, targets, _), *_ = self.prepare([row])
        problem = _problem_of_choices(self.task, targets)
        if problem:
            raise BadInput(f"tasks.{self.task.name}.choices: {problem}; use other words")

    def prepare(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> list[tuple[list[int], list[list[int]], bool]]:
        """Encode rows: per row (ids of its input, ids of its targets, whether any merges)."""
        texts = [self.prefix + render(self.task.input, row) for row in rows]
        inputs = self.encoder.inputs(texts)
        if not self.task.target:
            return [(ids, [[]], False) for ids in inputs]
        if self.choices is None:
            targets = [render(self.task.target, row) for row in rows]
        else:
            targets = list(self.choices) * len(rows)
        width = len(targets) // len(rows)
        ids, merged = self.encoder.targets(
            [text for text in texts for _ in range(width)],
            [ids for ids in inputs for _ in range(width)],
            targets,
        )
        parts = [slice(i * width, (i + 1) * width) for i in range(len(rows))]
        return [
            (own, ids[part], any(merged[part])) for own, part in zip(inputs, parts, strict=True)
        ]

    def examples(
        self,
        row: int,
        values: tuple[list[int], list[list[int]], bool],
        report: TokenizationReport,
    ) -> list[Example]:
        """Return one example per target, all with the same input."""
        input_ids, targets, merged = values
        ids = self._fit(row, input_ids, targets, report)
        if ids is None:
            return []
        if merged:
            report.add_merged(row)
        # Without a target, all tokens of the text except the first are labels.
        start = len(ids) if self.task.target else len(self._front(input_ids)) + 1
        return [Example.with_target((*ids, *target, *self.eos), start, row) for target in targets]

    def _fit(
        self, row: int, input_ids: list[int], targets: list[list[int]], report: TokenizationReport
    ) -> list[int] | None:
        """Return the ids of the input, truncated if needed; None if skipped or invalid."""
        room = self.max_length - max(map(len, targets)) - len(self.eos)
        front = self._front(input_ids)
        same = _problem_of_choices(self.task, targets) if self.choices is not None else None
        if self.task.target and not all(targets):
            report.add_problem(row, "its target gives no tokens; the tokenizer drops this text")
        elif same:
            report.add_problem(row, f"after its input {same}; change the input or use other words")
        elif len(input_ids) <= len(self.encoder.front):
            report.add_problem(row, "its input gives no tokens; the tokenizer drops this text")
        elif not self.task.target and len(input_ids) + len(self.eos) < len(front) + 2:
            report.add_problem(row, "has one token and no EOS: nothing to predict; remove the row")
        elif len(input_ids) <= room:
            return input_ids
        elif not self.may_truncate(row, len(input_ids) + self.max_length - room, report):
            pass
        elif room <= len(front):
            report.add_problem(
                row,
                f"its target alone has {self.max_length - room} tokens; {self.max_length} fit, "
                f"including what precedes it; a target is never cut: shorten it, or set "
                f"tasks.{self.task.name}.too_long to skip",
            )
        else:
            report.truncated += 1
            return front + input_ids[len(front) - room :]
        return None

    def _front(self, ids: list[int]) -> list[int]:
        """Return the first tokens of a row, which are never cut."""
        return next((front for front in self.fronts if ids[: len(front)] == front), self.fronts[0])


def _problem_of_choices(task: Task, targets: list[list[int]]) -> str | None:
    """Describe choices with equal tokens, or without tokens; None if there are none."""
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
