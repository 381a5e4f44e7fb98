"""Rows -> token ids with the place where the labels start. Needs a tokenizer, but no torch.

A row is ``tokenizer(input)`` with its special tokens, then the target's tokens as they continue
that text (encoder.py), then EOS. The loss is on the target and EOS only; of a task without targets,
whose prompts learn from a teacher, on all of the text but its first token. Dialogues are written by
the tokenizer's chat template (chat.py), and rows may be token ids already (given.py).

Files of many rows are tokenised by worker processes, once: the table is kept in the cache.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from trainer.config import Task
from trainer.data.dataset import RowDataset, gold_target
from trainer.data.row_validation import Problems, label_texts, render
from trainer.data.token_cache import cached, tokenizer_digest
from trainer.data.token_table import Example, TokenBlock, TokenTable, in_memory
from trainer.data.tokenization.chat import DialogueRowTokenizer, encode_opening
from trainer.data.tokenization.chat_template import reads_date
from trainer.data.tokenization.report import COUNTS, RowTokenizer, TokenizationReport
from trainer.data.tokenization.text import TextRowTokenizer
from trainer.data.tokenization.token_ids import TokenIdRowReader
from trainer.data.tokenization.tokenizer import TextTokenizer
from trainer.data.tokenization.worker_pool import in_order
from trainer.runtime.errors import BadInput

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

#: From this many rows on, or texts where rows have choices, workers and the cache cost less than
#: they save.
MANY_ROWS, MANY_TEXTS = 5000, 50_000
#: Rows of a batch, or texts where rows have many choices: what a worker holds at a time.
_BATCH_ROWS, _BATCH_TEXTS = 1000, 20_000

#: Shows that rows are read: ``with progress(what, rows) as advance: advance(number of rows)``.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def unseen(what: str = "", total: int = 0) -> AbstractContextManager[Callable[[int], None]]:
    """A ``Progress`` that shows nothing."""
    return nullcontext(lambda rows: None)


@dataclass(frozen=True)
class Tokenized:
    """Examples of a file, and what happened to its rows.

    Attributes:
        skipped, truncated: rows, by ``task.too_long``.
        warning: rows whose input and target the tokenizer merges; None if there are none.
    """

    examples: TokenTable
    skipped: int
    truncated: int
    warning: str | None = None


def tokenize(
    rows: RowDataset,
    task: Task,
    tokenizer: Any,
    max_length: int,
    *,
    prefix: str = "",
    date: datetime.date | None = None,
    progress: Progress = unseen,
) -> Tokenized:
    """Tokenize every row with its own target.

    Args:
        rows: checked rows.
        task: templates, ``append_eos`` and ``too_long``.
        tokenizer: a transformers tokenizer, fast or slow.
        max_length: most tokens of a row: the context minus the virtual tokens.
        prefix: a hard prompt, put in front of the input text; it is never cut.
        date: the day that a chat template reads; None: today.

    Raises:
        BadInput: rows that do not fit (too_long: refuse), targets that do not fit at all, texts
            that give no tokens, a tokenizer without EOS, or no row left.
    """
    fitter: RowTokenizer
    if task.messages is not None:
        fitter = DialogueRowTokenizer(task, tokenizer, max_length, date)
    elif task.tokens is not None:
        fitter = TokenIdRowReader(task, max_length)
    else:
        fitter = TextRowTokenizer(task, tokenizer, max_length, prefix)
    return _tokenized(rows, tokenizer, fitter, progress)


def tokenize_choices(
    rows: RowDataset,
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
    fitter = TextRowTokenizer(task, tokenizer, max_length, prefix, label_texts(task))
    fitter.check_choices(rows[0])
    return _tokenized(rows, tokenizer, fitter, progress)


def gold(rows: RowDataset, task: Task) -> list[int]:
    """Index in ``task.choices`` of every row's own target."""
    assert task.choices is not None
    index = {choice: i for i, choice in enumerate(task.choices)}
    return [index[gold_target(row, task)] for row in rows]


def encode_input(
    tokenizer: Any, text: str, *, dialogue: bool = False, date: datetime.date | None = None
) -> list[int]:
    """Token ids of one input as rows have them, for generating from text that is in no file.

    Args:
        dialogue: the text is a user's turn, for the chat template.
        date: the day that a chat template reads; None: today.
    """
    if dialogue:
        return encode_opening(tokenizer, text, date)
    return TextTokenizer(tokenizer).inputs([text])[0]


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


def _tokenized(
    rows: RowDataset, tokenizer: Any, fitter: RowTokenizer, progress: Progress
) -> Tokenized:
    """All rows through the fitter: here if they are few, else by workers, or from the cache."""
    found = TokenizationReport()
    many = len(rows) >= MANY_ROWS or len(rows) * _width(fitter) >= MANY_TEXTS

    def make() -> Iterator[TokenBlock]:
        nonlocal found
        found = TokenizationReport()
        with progress(f"tokenising {rows.path}", len(rows)) if many else unseen() as advance:
            for block, part in in_order(fitter, _batches(rows, fitter), here=not many):
                found.add(part)
                advance(part.rows)
                yield block
        _check_found(rows, fitter, found)

    def counts() -> dict[str, int]:
        return {name: getattr(found, name) for name in COUNTS}

    if many:
        table, count = cached(_identity(rows, tokenizer, fitter), make, counts)
    else:
        table, count = in_memory(make()), counts()
    warning = _merge_warning(rows, fitter.task, count["merged"], count["first_merged"])
    return Tokenized(table, count["skipped"], count["truncated"], warning)


def _width(fitter: RowTokenizer) -> int:
    """Targets of every row."""
    return len(getattr(fitter, "choices", None) or [""])


def _merge_warning(rows: RowDataset, task: Task, merged: int, first: int) -> str | None:
    if not merged:
        return None
    if task.messages is not None:
        return (
            f"{rows.where(first)}: the tokenizer merges the end of a turn with the beginning of "
            f"the next (in {merged:,} of {len(rows):,} rows); generation reads the turns before "
            "alone, so they are tokenized apart; strip white space around the content of turns, "
            "unless the chat template itself writes it there"
        )
    between = f"between tasks.{task.name}.input and target"
    remedy = f"put a space or a line break {between}"
    if render(task.input, rows[first])[-1:].isspace():
        remedy = f"move the white space {between} to the beginning of target"
    return (
        f"{rows.where(first)}: the tokenizer merges the end of the input with the beginning of the "
        f"target (in {merged:,} of {len(rows):,} rows); generation reads the input alone, so they "
        f"are tokenized apart; {remedy}"
    )


def _batches(rows: RowDataset, fitter: RowTokenizer) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    size = min(_BATCH_ROWS, max(1, _BATCH_TEXTS // _width(fitter)))
    batch: list[dict[str, Any]] = []
    first = 0
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield first, batch
            first, batch = first + size, []
    if batch:
        yield first, batch


def _check_found(rows: RowDataset, fitter: RowTokenizer, found: TokenizationReport) -> None:
    grouped = Problems(rows.path)
    for text, (row, count) in found.problems.items():
        grouped.add(row, rows.where(row), text, count)
    grouped.rows = found.count
    problems = grouped.row_lines()
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
    "stop",
    "hand_written",
}


def _identity(rows: RowDataset, tokenizer: Any, fitter: RowTokenizer) -> dict[str, Any]:
    """All that a table follows from."""
    return {
        "rows": [rows.digest, len(rows)],
        "tokenizer": tokenizer_digest(tokenizer),
        "task": fitter.task.model_dump(mode="json", exclude=_NOT_TOKENS),
        "choices": getattr(fitter, "choices", None),
        "prefix": getattr(fitter, "prefix", ""),
        "max_length": fitter.max_length,
        "date": _date(tokenizer, fitter),
    }


def _date(tokenizer: Any, fitter: RowTokenizer) -> str | None:
    """The day that the chat template of dialogues reads, if it reads one."""
    if not isinstance(fitter, DialogueRowTokenizer) or not reads_date(tokenizer):
        return None
    return (fitter.date or datetime.date.today()).isoformat()
