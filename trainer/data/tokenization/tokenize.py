"""Tokenization of a split: rows -> ``TokenTable``. Needs a tokenizer, but no torch.

A row is ``tokenizer(input)`` with its special tokens, then the target as a continuation of that
text (module ``tokenizer``), then EOS. The labels are the target and EOS; in a task without targets,
whose prompts learn from a teacher, all tokens of the text except the first. Dialogues are written
by the tokenizer's chat template (``dialogue_rows``); ``token_ids`` reads tokenized rows.

Large splits are tokenized by worker processes, and the table is cached.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from trainer.config import Task, split_template, template_fields
from trainer.config.prompt import AFTER
from trainer.data.dataset import RowDataset
from trainer.data.row_validation import Problems, label_texts, render
from trainer.data.token_cache import cached, tokenizer_digest
from trainer.data.token_table import TokenBlock, TokenTable, in_memory
from trainer.data.tokenization.chat_template import TemplateLimitExceeded, reads_date
from trainer.data.tokenization.dialogue_rows import (
    DialogueRowTokenizer,
    dialogue_encoder,
    limit_problem,
    user_messages,
)
from trainer.data.tokenization.message_edits import MARK, with_mark
from trainer.data.tokenization.row_tokenizer import COUNTS, RowTokenizer, TokenizationReport
from trainer.data.tokenization.text import TextRowTokenizer
from trainer.data.tokenization.token_ids import TokenIdRowReader
from trainer.data.tokenization.tokenizer import TextTokenizer
from trainer.data.tokenization.worker_pool import map_in_order
from trainer.runtime.errors import BadInput

#: Minimum number of rows, or of texts (rows times choices), for worker processes and the cache.
MANY_ROWS, MANY_TEXTS = 5000, 50_000
#: Maximum number of rows, and of texts (rows times choices), of a worker's batch.
_BATCH_ROWS, _BATCH_TEXTS = 1000, 20_000

#: Shows the progress of rows: ``with progress(what, rows) as advance: advance(number of rows)``.
RowProgress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def no_progress(what: str = "", total: int = 0) -> AbstractContextManager[Callable[[int], None]]:
    """A ``RowProgress`` that shows nothing."""
    return nullcontext(lambda rows: None)


@dataclass(frozen=True)
class Tokenized:
    """Examples of a split, and the outcome of tokenizing its rows.

    Attributes:
        skipped, truncated: number of rows, by ``task.too_long``.
        warnings: about rows whose input and target the tokenizer merges, and answers of which the
            chat template omits a part.
        rewritten: number of dialogues in which the chat template rewrites earlier turns.
    """

    examples: TokenTable
    skipped: int
    truncated: int
    warnings: tuple[str, ...] = ()
    rewritten: int = 0


def tokenize(
    rows: RowDataset,
    task: Task,
    tokenizer: Any,
    max_length: int,
    *,
    prefix: str = "",
    per_choice: bool = False,
    position: str = "front",
    date: datetime.date | None = None,
    end_ids: Collection[int] = (),
    progress: RowProgress = no_progress,
) -> Tokenized:
    """Tokenize every row.

    Args:
        tokenizer: a transformers tokenizer, fast or slow.
        max_length: maximum tokens of a row: the context minus the virtual tokens.
        prefix: a hard prompt before the input text; it is never cut.
        per_choice: make one example per choice of the task, in this order, instead of one with the
            row's own target. All have the same input, cut so that the longest choice fits; a row
            whose longest choice does not fit is skipped with all its choices.
        position: ``Prompt.placement``.
        date: the date that a chat template reads; None: today.
        end_ids: tokens at which the base's generation stops, for dialogues.

    Raises:
        BadInput: rows do not fit (too_long: refuse), targets do not fit at all, texts give no
            tokens, choices have equal tokens, the tokenizer has no EOS, or no row is left.
    """
    choices = (label_texts(task) or None) if per_choice else None
    row_tokenizer: TextRowTokenizer | DialogueRowTokenizer | TokenIdRowReader
    if task.tokens is not None:
        row_tokenizer = TokenIdRowReader(task, max_length)
        return _tokenize_all(rows, tokenizer, row_tokenizer, progress)
    if task.is_chat:
        row_tokenizer = DialogueRowTokenizer(
            *(task, tokenizer, max_length, date, end_ids),
            prefix=prefix,
            choices=choices,
            position=position,
        )
    else:
        row_tokenizer = TextRowTokenizer(task, tokenizer, max_length, prefix, choices)
    if per_choice:
        row_tokenizer.check_choices(rows[0])
    return _tokenize_all(rows, tokenizer, row_tokenizer, progress)


def encode_input(tokenizer: Any, text: str) -> list[int]:
    """Tokenize one text like the inputs of rows."""
    return TextTokenizer(tokenizer).inputs([text])[0]


def encode_request(
    tokenizer: Any,
    task: Task,
    text: str,
    *,
    position: str = "front",
    date: datetime.date | None = None,
    name: str = "text",
) -> tuple[list[int], int]:
    """Tokenize the input of a row that is in no file, up to where the base continues it.

    Args:
        text: fills the input template if that has exactly one column that is not optional;
            otherwise it is the complete input or, for a dialogue, the user's turn.
        position: ``Prompt.placement``.
        date: the date that a chat template reads; None: today.
        name: of the text in messages.

    Returns:
        The ids, and the number of those before the virtual tokens.

    Raises:
        BadInput: the template has ``{virtual_tokens}`` and other than one column, or the chat
            template is missing or fails.
    """
    columns = [name for name in template_fields(task.input) if name not in task.optional]
    halves = split_template(task.input)
    if len(columns) == 1:
        values = dict.fromkeys(task.optional, "") | {columns[0]: text}
        text = render(task.input, values, MARK)
    elif halves is not None:
        raise BadInput(
            f"{name}: the template of task {task.name!r} has {len(columns)} columns and "
            "{virtual_tokens}; only templates with one column can be filled in"
        )
    if not task.is_chat:
        if halves is None:
            return encode_input(tokenizer, text), 0
        before, _, after = text.partition(MARK)
        return encode_halves(tokenizer, before, after)
    encoder, inside = dialogue_encoder(tokenizer, task, date), position.removeprefix(AFTER)
    try:
        ids, at = encoder.marked_opening(with_mark(user_messages(task, text), inside))
        return (ids[at:], 0) if position.startswith(AFTER) else (ids, at)
    except TemplateLimitExceeded as error:
        raise BadInput(f"base.model: {limit_problem(error)}") from None
    except ValueError as error:
        raise BadInput(f"base.model: {error}") from None


def encode_halves(tokenizer: Any, before: str, after: str) -> tuple[list[int], int]:
    """Tokenize the text before and after the virtual tokens, as ``encode_input``.

    Returns:
        The ids of both, and the number of those before the virtual tokens.
    """
    encoder = TextTokenizer(tokenizer)
    first = encoder.inputs([before])
    (second,), _ = encoder.targets([before], first, [after])
    return first[0] + second, len(first[0])


def check_vocabulary(examples: TokenTable, vocab_size: int) -> None:
    """Raise ``BadInput`` if an id has no embedding: the tokenizer is then not that of the base."""
    example = examples.first_beyond(vocab_size)
    if example is not None:
        raise BadInput(
            f"base.model: row {example.row + 1} has the id {max(example.input_ids)}, but the base "
            f"embeds {vocab_size} tokens; its tokenizer, or the one that made the rows, is not "
            "that of the weights"
        )


def _tokenize_all(
    rows: RowDataset, tokenizer: Any, row_tokenizer: RowTokenizer, progress: RowProgress
) -> Tokenized:
    """Tokenize few rows in this process, many in worker processes or from the cache."""
    report = TokenizationReport()
    width = len(row_tokenizer.choices or [""])
    many = len(rows) >= MANY_ROWS or len(rows) * width >= MANY_TEXTS
    batch_rows = min(_BATCH_ROWS, max(1, _BATCH_TEXTS // width))

    def make() -> Iterator[TokenBlock]:
        nonlocal report
        report = TokenizationReport()
        show = progress if many else no_progress
        with show(f"tokenizing {rows.path}", len(rows)) as advance:
            batches = _batches(rows, batch_rows)
            for block, outcome in map_in_order(row_tokenizer, batches, in_process=not many):
                report.add(outcome)
                advance(outcome.rows)
                yield block
        _raise_problems(rows, row_tokenizer, report)

    def counts() -> dict[str, int]:
        return {name: getattr(report, name) for name in COUNTS}

    if many:
        identity = {
            "rows": [rows.digest, len(rows)],
            "tokenizer": tokenizer_digest(tokenizer),
            "task": row_tokenizer.task.model_dump(mode="json", exclude=_NO_EFFECT_ON_TOKENS),
            "choices": row_tokenizer.choices,
            "prefix": row_tokenizer.prefix,
            "position": row_tokenizer.position,
            "max_length": row_tokenizer.max_length,
            "date": _template_date(tokenizer, row_tokenizer),
            "end_ids": _end_ids(row_tokenizer),
        }
        table, count = cached(identity, make, counts)
    else:
        table, count = in_memory(make()), counts()
    warnings = tuple(_warnings(rows, row_tokenizer.task, count))
    return Tokenized(table, count["skipped"], count["truncated"], warnings, count["branched"])


def _warnings(rows: RowDataset, task: Task, count: Mapping[str, int]) -> Iterator[str]:
    def share(name: str) -> str:
        return f"(in {count[name]:,} of {len(rows):,} rows)"

    if count["merged"]:
        yield _merge_warning(rows, task, count["first_merged"], share("merged"))
    if count["omitting"]:
        yield (
            f"{rows.where(count['first_omitting'])}: the chat template does not write the "
            f"reasoning of an answer, or its text beside tool calls {share('omitting')}; the "
            "answer is learned without it; use base.chat_template with a template that writes it, "
            "or remove it from the rows"
        )


def _merge_warning(rows: RowDataset, task: Task, first: int, share: str) -> str:
    where = rows.where(first)
    if task.is_chat:
        return (
            f"{where}: the tokenizer merges the end of a turn with the beginning of the next "
            f"{share}; generation reads the turns before alone, so they are tokenized separately; "
            "strip white space around the content of turns, unless the chat template itself writes "
            "it there"
        )
    between = f"between tasks.{task.name}.input and target"
    remedy = f"put a space or a line break {between}"
    if render(task.input, rows[first])[-1:].isspace():
        remedy = f"move the white space {between} to the beginning of target"
    return (
        f"{where}: the tokenizer merges the end of the input with the beginning of the target "
        f"{share}; generation reads the input alone, so they are tokenized separately; {remedy}"
    )


def _batches(rows: RowDataset, size: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield (number of the first row, rows)."""
    batch: list[dict[str, Any]] = []
    first = 0
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield first, batch
            first, batch = first + size, []
    if batch:
        yield first, batch


def _raise_problems(
    rows: RowDataset, row_tokenizer: RowTokenizer, report: TokenizationReport
) -> None:
    grouped = Problems(rows.path)
    for text, (row, count) in report.problems.items():
        grouped.add(row, rows.where(row), text, count)
    grouped.rows = report.invalid
    problems = grouped.row_lines()
    if report.skipped == len(rows) and not problems:
        problems.append(
            f"{rows.path}: all {report.skipped} rows are longer than {row_tokenizer.max_length} "
            f"tokens {row_tokenizer.limit}: too_long: skip leaves none; use truncate"
        )
    if problems:
        raise BadInput(problems)


#: Settings of a task that do not affect its tokens.
_NO_EFFECT_ON_TOKENS = {
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
    "paraphrases",
}


def _end_ids(row_tokenizer: RowTokenizer) -> list[int] | None:
    if not isinstance(row_tokenizer, DialogueRowTokenizer):
        return None
    return sorted(row_tokenizer.end_ids)


def _template_date(tokenizer: Any, row_tokenizer: RowTokenizer) -> str | None:
    if not isinstance(row_tokenizer, DialogueRowTokenizer) or not reads_date(tokenizer):
        return None
    return (row_tokenizer.date or datetime.date.today()).isoformat()
