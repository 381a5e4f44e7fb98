"""Rows -> token ids with the place where the labels start. Needs a tokenizer, but no torch.

A row is ``tokenizer(input)`` with its special tokens, then ``tokenizer(target)`` without them,
then EOS. The loss is on the target and EOS only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config import Task
from trainer.errors import BadInput
from trainer.tasks.checks import MOST_PROBLEMS, fields, render
from trainer.tasks.rows import Rows, gold_target

_BATCH = 1000


@dataclass(frozen=True)
class Example:
    """One row as the base reads it.

    Attributes:
        input_ids: the whole row: input, target, EOS; no virtual tokens.
        label_spans: (start, stop) of the tokens that are labels, ascending and apart: one for a
            target, one per answer of a dialogue.
        row: index in its ``Rows``.
    """

    input_ids: tuple[int, ...]
    label_spans: tuple[tuple[int, int], ...]
    row: int

    @classmethod
    def with_target(cls, input_ids: tuple[int, ...], target_start: int, row: int) -> Example:
        """All tokens from ``target_start`` on are labels."""
        return cls(input_ids, ((target_start, len(input_ids)),), row)

    @property
    def target_start(self) -> int:
        """Index of the first label."""
        return self.label_spans[0][0]

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        return sum(stop - start for start, stop in self.label_spans)


@dataclass(frozen=True)
class Tokenized:
    """Examples of a file, and what ``task.too_long`` did to the others."""

    examples: list[Example]
    skipped: int
    truncated: int


def tokenize(
    rows: Rows, task: Task, tokenizer: Any, max_length: int, *, prefix: str = ""
) -> Tokenized:
    """Tokenize every row with its own target.

    Args:
        rows: checked rows.
        task: templates, ``append_eos`` and ``too_long``.
        tokenizer: a transformers tokenizer, fast or slow.
        max_length: most tokens of a row: the context minus the virtual tokens.
        prefix: a hard prompt, put in front of the input text; it is never cut.

    Raises:
        BadInput: rows that do not fit (too_long: refuse), targets that do not fit at all, texts
            that give no tokens, a tokenizer without EOS, or no row left.
    """
    fitter = _Fitter(rows, task, tokenizer, max_length, prefix)
    targets = _in_batches(
        lambda texts: _encode(tokenizer, texts, special=False),
        (render(task.target, row) for row in rows),
    )
    examples = []
    for row, (input_ids, target) in enumerate(zip(fitter.inputs(), targets, strict=True)):
        examples += fitter.fit(row, input_ids, [target])
    return Tokenized(examples, *fitter.finish())


def tokenize_choices(
    rows: Rows, task: Task, tokenizer: Any, max_length: int, *, prefix: str = ""
) -> list[list[Example]]:
    """Tokenize every row once per choice: ``[row][choice]``, in the order of ``task.choices``.

    All choices of a row follow the same input, cut so that the longest fits; a row whose longest
    choice does not fit is skipped whole (its number is missing from ``Example.row``).

    Raises:
        BadInput: as ``tokenize``; or two choices give the same tokens.
    """
    assert task.choices is not None, "a task without choices is not scored by likelihood"
    fitter = _Fitter(rows, task, tokenizer, max_length, prefix)
    column = fields(task.target)[0]
    texts = [render(task.target, {column: choice}) for choice in task.choices]
    targets = _encode(tokenizer, texts, special=False)
    _check_choices(task, targets)
    found = [fitter.fit(row, ids, targets) for row, ids in enumerate(fitter.inputs())]
    fitter.finish()
    return [examples for examples in found if examples]


def gold(rows: Rows, task: Task) -> list[int]:
    """Index in ``task.choices`` of every row's own target."""
    assert task.choices is not None
    index = {choice: i for i, choice in enumerate(task.choices)}
    return [index[gold_target(row, task)] for row in rows]


def encode_input(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one input as rows have them, for generating from text that is in no file."""
    return _Specials(tokenizer).encode([text])[0]


def check_vocabulary(examples: Iterable[Example], vocab_size: int) -> None:
    """Refuse a tokenizer that is not the base's: an id without an embedding.

    Raises:
        BadInput: naming the first such id.
    """
    for example in examples:
        largest = max(example.input_ids)
        if largest >= vocab_size:
            raise BadInput(
                f"base.model: the tokenizer gives id {largest} (row {example.row + 1}), but the "
                f"base embeds {vocab_size} tokens; tokenizer and weights are not of one model"
            )


class _Specials:
    """Encodes inputs with the special tokens that belong in front of a text, and none behind it.

    Some tokenizers close every text with EOS or a separator; between input and target that would
    end the document before its answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        bare = _encode(tokenizer, ["a"], special=False)[0]
        full = _encode(tokenizer, ["a"], special=True)[0]
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
        self.front = full[:start] if start else []
        self.back = full[start + len(bare) :] if start is not None else []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = _encode(self.tokenizer, texts, special=True)
        if not self.back:
            return encoded
        cut = len(self.back)
        return [ids[:-cut] if ids[-cut:] == self.back else ids for ids in encoded]


class _Fitter:
    """Puts inputs and targets together, within ``max_length``, by the policy of the task."""

    def __init__(
        self, rows: Rows, task: Task, tokenizer: Any, max_length: int, prefix: str
    ) -> None:
        self.rows, self.task, self.max_length, self.prefix = rows, task, max_length, prefix
        self.specials = _Specials(tokenizer)
        # What stands in front of the row's own text and is never cut: BOS and the hard prompt.
        self.kept = self.specials.encode([prefix])[0] if prefix else self.specials.front
        self.eos = self._eos(tokenizer)
        self.skipped = self.truncated = 0
        self.count, self.problems = 0, list[str]()
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

    def inputs(self) -> Iterator[list[int]]:
        """Token ids of every row's input, hard prompt and special tokens included."""
        texts = (self.prefix + render(self.task.input, row) for row in self.rows)
        return _in_batches(self.specials.encode, texts)

    def fit(self, row: int, input_ids: list[int], targets: list[list[int]]) -> list[Example]:
        """One example per target, all behind the same input; none if the row is left out."""
        room = self.max_length - max(map(len, targets)) - len(self.eos)
        if not all(targets):
            self._problem(row, "its target gives no tokens; the tokenizer drops this text")
        elif len(input_ids) <= len(self.specials.front):
            self._problem(row, "its input gives no tokens; the tokenizer drops this text")
        elif len(input_ids) <= room:
            return self._examples(row, input_ids, targets)
        elif self.task.too_long == "skip":
            self.skipped += 1
        elif self.task.too_long == "refuse":
            length = len(input_ids) + self.max_length - room
            self._problem(
                row,
                f"has {length} tokens, {self.max_length} fit (context minus virtual tokens); "
                f"shorten it, or set tasks.{self.task.name}.too_long to skip or truncate",
            )
        elif room <= len(self.kept):
            self._problem(
                row,
                f"its target alone has {self.max_length - room} tokens; {self.max_length} fit, "
                f"with what must stand before it; a target is never cut: shorten it, or set "
                f"tasks.{self.task.name}.too_long to skip",
            )
        else:
            self.truncated += 1
            own = room - len(self.kept)
            return self._examples(row, self.kept + input_ids[-own:], targets)
        return []

    def _examples(self, row: int, ids: list[int], targets: list[list[int]]) -> list[Example]:
        return [
            Example.with_target((*ids, *target, *self.eos), len(ids), row) for target in targets
        ]

    def _problem(self, row: int, text: str) -> None:
        self.count += 1
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(f"{self.rows.where(row)}: {text}")

    def finish(self) -> tuple[int, int]:
        """(skipped, truncated), once every row went through."""
        if self.count > len(self.problems):
            self.problems.append(f"{self.rows.path}: and {self.count - len(self.problems)} more")
        if self.skipped == len(self.rows) and not self.problems:
            self.problems.append(
                f"{self.rows.path}: all {self.skipped} rows are longer than {self.max_length} "
                f"tokens (context minus virtual tokens): too_long: skip leaves none; use truncate"
            )
        if self.problems:
            raise BadInput(self.problems)
        return self.skipped, self.truncated


def _check_choices(task: Task, targets: list[list[int]]) -> None:
    assert task.choices is not None
    first: dict[tuple[int, ...], str] = {}
    for choice, target in zip(task.choices, targets, strict=True):
        if not target:
            raise BadInput(
                f"tasks.{task.name}.choices: {choice!r} gives no tokens with this tokenizer; "
                f"use another word"
            )
        other = first.setdefault(tuple(target), choice)
        if other != choice:
            raise BadInput(
                f"tasks.{task.name}.choices: {other!r} and {choice!r} give the same tokens, so "
                f"this base cannot tell them apart; use other words"
            )


def _encode(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    encoded = tokenizer(
        list(texts),
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,  # its warning about long texts: we report them ourselves
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _in_batches(encode: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield from encode(batch)
            batch = []
    if batch:
        yield from encode(batch)
