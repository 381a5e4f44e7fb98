"""Rows of input and target -> examples within the context. Needs a tokenizer, but no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import add
from typing import Any

from trainer.config import Task, fixed_beginning, split_template, template_fields
from trainer.data.examples_in_context import examples_text
from trainer.data.row_validation import render
from trainer.data.token_table import Example
from trainer.data.tokenization.row_tokenizer import (
    RowTokenizer,
    TokenizationReport,
    common_length,
    problem_of_choices,
)
from trainer.data.tokenization.tokenizer import TextTokenizer
from trainer.runtime.errors import BadInput


@dataclass(frozen=True)
class EncodedRow:
    """A row as tokens.

    Attributes:
        input_ids: of the input.
        targets: ids of each candidate target.
        merged: the tokenizer merges the end of the input with the beginning of a target.
        prompt_at, prompt_end: as in ``Example``.
    """

    input_ids: list[int]
    targets: list[list[int]]
    merged: bool = False
    prompt_at: int = 0
    prompt_end: int = 0


class TextRowTokenizer(RowTokenizer):
    """Tokenizes rows of input and target; truncation cuts the input on the left.

    With ``{virtual_tokens}`` in the input template, the text before the virtual tokens and the text
    after them are tokenized separately, because virtual tokens are between them. Otherwise the
    virtual tokens are before the special tokens at the beginning of the text, as in PEFT.

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
        halves = split_template(task.input)
        self.is_placed = halves is not None  # the template has {virtual_tokens}
        self.halves = None if prefix else halves
        self.is_prompt_first = self.halves is not None and not template_fields(self.halves[0])
        if prefix:
            self.limit = f"with tasks.{task.name}.hand_written {prefix!r} before it"
        if self.is_placed:
            beginning = render(fixed_beginning(task.input), {}, prefix)
            self.fronts = self.encoder.inputs([beginning, beginning.rstrip()])
        elif prefix:
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
        encoded, *_ = self.prepare([row])
        problem = problem_of_choices(self.task, encoded.targets)
        if problem:
            raise BadInput(f"tasks.{self.task.name}.choices: {problem}; use other words")

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> list[EncodedRow]:
        """Encode the inputs and targets of rows."""
        texts = [self.text(row) for row in rows]
        inputs = self.encoder.inputs(texts)
        encoded = [EncodedRow(ids, [[]]) for ids in inputs]
        if self.halves is not None:
            encoded = self._around_virtual_tokens(*self.halves, rows)
        if not self.task.target:
            return encoded
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
            replace(row, targets=ids[part], merged=any(merged[part]))
            for row, part in zip(encoded, parts, strict=True)
        ]

    def text(self, row: Mapping[str, Any]) -> str:
        """Return the input of a row, with hard prompt and examples, without virtual tokens."""
        examples = examples_text(self.task, row)
        if not self.is_placed:
            return self.prefix + examples + render(self.task.input, row)
        return examples + render(self.task.input, row, self.prefix)

    def _around_virtual_tokens(
        self, before: str, after: str, rows: Sequence[Mapping[str, Any]]
    ) -> list[EncodedRow]:
        """Encode the inputs of rows as the text before and after the virtual tokens."""
        # Examples directly precede the row's own text, after the prompt if that precedes this text.
        examples = [examples_text(self.task, row) for row in rows]
        first = [render(before, row) for row in rows]
        second = [render(after, row) for row in rows]
        if self.is_prompt_first:
            second = list(map(add, examples, second))
        else:
            first = list(map(add, examples, first))
        first_ids = self.encoder.inputs(first)
        second_ids, _ = self.encoder.targets(first, first_ids, second)
        # White space at the end often belongs to the following token, which is part of the row.
        fixed = "" if template_fields(before) else render(fixed_beginning(after), {}).rstrip()
        (fixed_ids,), _ = self.encoder.targets(first[:1], first_ids[:1], [fixed])
        return [
            EncodedRow(a + b, [[]], False, len(a), len(a) + common_length(b, fixed_ids))
            for a, b in zip(first_ids, second_ids, strict=True)
        ]

    def examples(self, row: int, values: EncodedRow, report: TokenizationReport) -> list[Example]:
        """Return one example per target, all with the same input."""
        fitting = self._fit(row, values, report)
        if fitting is None:
            return []
        if values.merged:
            report.add_merged(row)
        ids, at, end = fitting.input_ids, fitting.prompt_at, fitting.prompt_end
        start = self._first_label(fitting)
        return [
            Example(
                (*ids, *target, *self.eos),
                ((start, len(ids) + len(target) + len(self.eos)),),
                row,
                at,
                end,
            )
            for target in values.targets
        ]

    def _fit(self, row: int, values: EncodedRow, report: TokenizationReport) -> EncodedRow | None:
        """Return a row whose input is truncated if needed; None if it is skipped or invalid."""
        input_ids, targets = values.input_ids, values.targets
        room = self.max_length - max(map(len, targets)) - len(self.eos)
        front = self._front(values)
        same = problem_of_choices(self.task, targets) if self.choices is not None else None
        if self.task.target and not all(targets):
            report.add_problem(row, "its target gives no tokens; the tokenizer drops this text")
        elif same:
            report.add_problem(row, f"after its input {same}; change the input or use other words")
        elif len(input_ids) <= len(self.encoder.front):
            report.add_problem(row, "its input gives no tokens; the tokenizer drops this text")
        elif self._first_label(values) >= len(input_ids) + max(map(len, targets)) + len(self.eos):
            report.add_problem(row, self._nothing_to_predict)
        elif len(input_ids) <= room:
            return values
        elif self.may_truncate(row, len(input_ids) + self.max_length - room, report):
            cut = _cut(values, len(front), len(input_ids) - room)
            if room > len(front) and self._first_label(cut) < self.max_length:
                report.truncated += 1
                return cut
            what = f"its target alone has {self.max_length - room} tokens"
            if len(front) > len(self.encoder.front):
                fixed = f"the text before its first column has {len(front)}"
                what = f"{what}, {fixed}" if self.task.target else fixed
            report.add_problem(
                row,
                f"{what}; {self.max_length} fit, including what precedes it; a target and text of "
                "the template are never cut: shorten them, or set "
                f"tasks.{self.task.name}.too_long to skip",
            )
        return None

    def _first_label(self, row: EncodedRow) -> int:
        """Return the index of the first label: of the target, or the second token of own text."""
        if self.task.target:
            return len(row.input_ids)
        return max(row.prompt_end, len(self._front(row))) + 1

    @property
    def _nothing_to_predict(self) -> str:
        if self.halves is None:
            return "has one token and no EOS: nothing to predict; remove the row"
        return (
            "has less than two tokens after the virtual tokens: nothing to predict; move "
            f"{{virtual_tokens}} in tasks.{self.task.name}.input to the left"
        )

    def _front(self, row: EncodedRow) -> list[int]:
        """Return the first tokens of a row, which are never cut."""
        ids = row.input_ids
        if self.is_prompt_first:
            return ids[: row.prompt_end]
        return next((front for front in self.fronts if ids[: len(front)] == front), self.fronts[0])


def _cut(row: EncodedRow, start: int, count: int) -> EncodedRow:
    """Remove ``count`` tokens of the input from index ``start`` on."""

    def moved(index: int) -> int:
        return index if index <= start else max(start, index - count)

    ids = row.input_ids[:start] + row.input_ids[start + count :]
    return replace(
        row, input_ids=ids, prompt_at=moved(row.prompt_at), prompt_end=moved(row.prompt_end)
    )
