"""Rows -> token ids with the place where the labels start. Needs a tokenizer, but no torch.

A row is ``tokenizer(input)`` with its special tokens, then ``tokenizer(target)`` without them,
then EOS. The loss is on the target and EOS only; of a task without targets, whose prompts learn
from a teacher, on all of the text but its first token. Dialogues are written by the tokenizer's
chat template (chat.py), and rows may be token ids already (given.py).

Files of many rows are tokenised by worker processes, once: the table is kept in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from trainer.config import Task
from trainer.errors import BadInput
from trainer.tasks.cache import cached, tokenizer_digest
from trainer.tasks.chat import DialogueFitter, encode_opening
from trainer.tasks.checks import label_texts, render
from trainer.tasks.found import BEHIND_PROMPT, Fitter, Found, too_long
from trainer.tasks.given import GivenFitter
from trainer.tasks.rows import Rows, gold_target
from trainer.tasks.table import Block, Example, TokenTable, in_memory
from trainer.tasks.workers import in_order

__all__ = [
    "Example",
    "TokenTable",
    "Tokenized",
    "check_vocabulary",
    "encode_input",
    "gold",
    "tokenize",
    "tokenize_choices",
]

#: From this many rows on, workers and the cache cost less than they save.
MANY_ROWS = 5000
_BATCH = 1000

#: Shows that rows are read: ``with progress(what, rows) as advance: advance(number of rows)``.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def unseen(what: str = "", total: int = 0) -> AbstractContextManager[Callable[[int], None]]:
    """A ``Progress`` that shows nothing."""
    return nullcontext(lambda rows: None)


@dataclass(frozen=True)
class Tokenized:
    """Examples of a file, and what ``task.too_long`` did to the others."""

    examples: TokenTable
    skipped: int
    truncated: int


def tokenize(
    rows: Rows,
    task: Task,
    tokenizer: Any,
    max_length: int,
    *,
    prefix: str = "",
    progress: Progress = unseen,
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
    fitter: Fitter
    if task.messages is not None:
        fitter = DialogueFitter(task, tokenizer, max_length)
    elif task.tokens is not None:
        fitter = GivenFitter(task, max_length)
    else:
        fitter = _TextFitter(task, tokenizer, max_length, prefix)
    return _tokenized(rows, tokenizer, fitter, progress)


def tokenize_choices(
    rows: Rows,
    task: Task,
    tokenizer: Any,
    max_length: int,
    *,
    prefix: str = "",
    progress: Progress = unseen,
) -> Tokenized:
    """Tokenize every row once per choice, in the order of ``task.choices``.

    All choices of a row follow the same input, cut so that the longest fits; a row whose longest
    choice does not fit is skipped whole (its number is missing from ``Example.row``).

    Raises:
        BadInput: as ``tokenize``; or two choices give the same tokens.
    """
    assert task.choices is not None, "a task without choices is not scored by likelihood"
    targets = _encode(tokenizer, label_texts(task), special=False)
    _check_choices(task, targets)
    fitter = _TextFitter(task, tokenizer, max_length, prefix, targets)
    return _tokenized(rows, tokenizer, fitter, progress)


def gold(rows: Rows, task: Task) -> list[int]:
    """Index in ``task.choices`` of every row's own target."""
    assert task.choices is not None
    index = {choice: i for i, choice in enumerate(task.choices)}
    return [index[gold_target(row, task)] for row in rows]


def encode_input(tokenizer: Any, text: str, *, dialogue: bool = False) -> list[int]:
    """Token ids of one input as rows have them, for generating from text that is in no file.

    Args:
        dialogue: the text is a user's turn, for the chat template.
    """
    if dialogue:
        return encode_opening(tokenizer, text)
    return _Specials(tokenizer).encode([text])[0]


def check_vocabulary(examples: TokenTable, vocab_size: int) -> None:
    """Refuse a tokenizer that is not the base's: an id without an embedding.

    Raises:
        BadInput: naming the first such id.
    """
    example = examples.first_beyond(vocab_size)
    if example is not None:
        raise BadInput(
            f"base.model: row {example.row + 1} has the id {max(example.input_ids)}, but the base "
            f"embeds {vocab_size} tokens; its tokenizer, or the one that made the rows, is not "
            "that of the weights"
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


class _TextFitter:
    """Puts inputs and targets together, within ``max_length``, by the policy of the task.

    Args:
        choices: token ids of the targets that every row is tried with; None: each has its own.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        max_length: int,
        prefix: str,
        choices: list[list[int]] | None = None,
    ) -> None:
        self.task, self.tokenizer, self.max_length = task, tokenizer, max_length
        self.prefix, self.choices = prefix, choices
        self.specials = _Specials(tokenizer)
        # What stands in front of the row's own text and is never cut: BOS and the hard prompt.
        self.kept = self.specials.encode([prefix])[0] if prefix else self.specials.front
        self.eos = self._eos(tokenizer)
        self.limit = BEHIND_PROMPT
        if prefix:
            self.limit = f"with tasks.{task.name}.hand_written {prefix!r} in front"
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

    def __call__(self, first: int, rows: Sequence[Mapping[str, Any]]) -> tuple[Block, Found]:
        """Examples of consecutive rows, the first of which has the number ``first``."""
        texts = [self.prefix + render(self.task.input, row) for row in rows]
        inputs = self.specials.encode(texts)
        if self.choices is None:
            texts = [render(self.task.target, row) for row in rows]
            targets = [[ids] for ids in _encode(self.tokenizer, texts, special=False)]
        else:
            targets = [self.choices] * len(rows)
        if not self.task.target:
            targets = [[[]]] * len(rows)
        found, examples = Found(len(rows)), list[Example]()
        for i, (input_ids, behind) in enumerate(zip(inputs, targets, strict=True)):
            examples += self._fit(first + i, input_ids, behind, found)
        return Block.of(examples), found

    def _fit(
        self, row: int, input_ids: list[int], targets: list[list[int]], found: Found
    ) -> list[Example]:
        """One example per target, all behind the same input; none if the row is left out."""
        room = self.max_length - max(map(len, targets)) - len(self.eos)
        if self.task.target and not all(targets):
            found.problem(row, "its target gives no tokens; the tokenizer drops this text")
        elif len(input_ids) <= len(self.specials.front):
            found.problem(row, "its input gives no tokens; the tokenizer drops this text")
        elif not self.task.target and len(input_ids) + len(self.eos) < len(self.kept) + 2:
            found.problem(row, "has one token and no EOS: nothing to predict; leave the row out")
        elif len(input_ids) <= room:
            return self._examples(row, input_ids, targets)
        elif self.task.too_long == "skip":
            found.skipped += 1
        elif self.task.too_long == "refuse":
            found.problem(row, too_long(len(input_ids) + self.max_length - room, self))
        elif room <= len(self.kept):
            found.problem(
                row,
                f"its target alone has {self.max_length - room} tokens; {self.max_length} fit, "
                f"with what must stand before it; a target is never cut: shorten it, or set "
                f"tasks.{self.task.name}.too_long to skip",
            )
        else:
            found.truncated += 1
            own = room - len(self.kept)
            return self._examples(row, self.kept + input_ids[-own:], targets)
        return []

    def _examples(self, row: int, ids: list[int], targets: list[list[int]]) -> list[Example]:
        # Without a target each token of the text is to be predicted by those before it.
        start = len(ids) if self.task.target else len(self.kept) + 1
        return [Example.with_target((*ids, *target, *self.eos), start, row) for target in targets]


def _tokenized(rows: Rows, tokenizer: Any, fitter: Fitter, progress: Progress) -> Tokenized:
    """All rows through the fitter: here if they are few, else by workers, or from the cache."""
    found = Found()

    def make() -> Iterator[Block]:
        nonlocal found
        found = Found()
        many = len(rows) >= MANY_ROWS
        with progress(f"tokenising {rows.path}", len(rows)) if many else unseen() as advance:
            for block, part in in_order(fitter, _batches(rows), here=not many):
                found.add(part)
                advance(part.rows)
                yield block
        _check_found(rows, fitter, found)

    def counts() -> dict[str, int]:
        return {"skipped": found.skipped, "truncated": found.truncated}

    if len(rows) < MANY_ROWS:
        return Tokenized(in_memory(make()), **counts())
    table, said = cached(_identity(rows, tokenizer, fitter), make, counts)
    return Tokenized(table, said["skipped"], said["truncated"])


def _batches(rows: Rows) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    batch: list[dict[str, Any]] = []
    first = 0
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield first, batch
            first, batch = first + _BATCH, []
    if batch:
        yield first, batch


def _check_found(rows: Rows, fitter: Fitter, found: Found) -> None:
    problems = [f"{rows.where(row)}: {text}" for row, text in found.problems]
    if found.count > len(problems):
        problems.append(f"{rows.path}: and {found.count - len(problems)} more")
    if found.skipped == len(rows) and not problems:
        problems.append(
            f"{rows.path}: all {found.skipped} rows are longer than {fitter.max_length} "
            f"tokens {fitter.limit}: too_long: skip leaves none; use truncate"
        )
    if problems:
        raise BadInput(problems)


#: Settings of a task that say nothing about its tokens.
_NOT_TOKENS = {
    "name",
    "train",
    "validation",
    "shifted_validation",
    "validation_share",
    "max_rows",
    "max_validation_rows",
    "metric",
    "tests",
    "max_new_tokens",
    "hand_written",
}


def _identity(rows: Rows, tokenizer: Any, fitter: Fitter) -> dict[str, Any]:
    """All that a table follows from."""
    return {
        "rows": [rows.digest, len(rows)],
        "tokenizer": tokenizer_digest(tokenizer),
        "task": fitter.task.model_dump(mode="json", exclude=_NOT_TOKENS),
        "choices": getattr(fitter, "choices", None),
        "prefix": getattr(fitter, "prefix", ""),
        "max_length": fitter.max_length,
    }


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
