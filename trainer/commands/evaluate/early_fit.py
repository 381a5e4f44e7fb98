"""Refuse more examples in context than the base can hold, before any rank starts. No torch.

Tokens are counted for the shortest row and for as few tokens of examples as there can be, so
nothing that fits is refused. The ranks check every row, before the base is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from trainer.commands.evaluate.options import Options
from trainer.config import RunConfig, Task
from trainer.data.column_parsers import content_of
from trainer.data.dataset import RowDataset
from trainer.data.examples_in_context import (
    EXAMPLES,
    example_turns,
    examples_text,
    fixed_examples,
    input_text,
)
from trainer.data.row_hashing import first_by_hash
from trainer.model.tokenizer_file import longest_context, token_ends

#: Of the train rows with the shortest texts, this many per retrieved example are tokenized.
SHORTEST = 4
#: Why examples cannot stand before a row that is truncated without them, and the remedy.
NOT_TRUNCATED = (
    "rows after examples are not truncated; leave the option out, or evaluate shorter rows (--data)"
)


def examples_fit(
    options: Options, config: RunConfig
) -> Callable[[Task, Mapping[str, RowDataset]], list[str]]:
    """Return a function that describes why the examples of a task cannot fit, given its splits."""
    context, ends = None, None
    if options.shots is not None or options.retrieved is not None:
        context, ends = longest_context(config.base), token_ends(config.base)

    def check(task: Task, splits: Mapping[str, RowDataset]) -> list[str]:
        if context is None or ends is None or "validation" not in splits:
            return []
        train, rows = splits["train"], _evaluated(splits["validation"], options.rows)

        def num_tokens(text: str) -> int:
            return len(ends(text))

        shortest = min((input_text(task, rows[i]) for i in range(len(rows))), key=len)
        room = context - num_tokens(shortest)
        if room < 0:
            return _too_long_alone(options, context - room, context, task)
        problems = []
        if (count := options.shots) is not None:
            drawn = fixed_examples(task, train, count, config.training.seed, rows)
            tokens = num_tokens(_text(task, [train[i] for i in drawn]))
            problems += _problem("--shots", count, tokens, room, context, task)
        if (count := options.retrieved) is not None:
            texts = sorted((_text(task, [train[i]]) for i in range(len(train))), key=len)
            sizes = sorted(map(num_tokens, texts[: SHORTEST * count]))
            problems += _problem("--retrieved", count, sum(sizes[:count]), room, context, task)
        return problems

    return check


def _evaluated(rows: RowDataset, count: int | None) -> RowDataset:
    if count is None or len(rows) <= count:
        return rows
    return rows.take(first_by_hash(rows.hashes(), count), "evaluated")


def _text(task: Task, examples: Sequence[dict[str, object]]) -> str:
    """Return the text of examples, in a dialogue without what the chat template adds."""
    row = {EXAMPLES: examples}
    if not task.is_chat:
        return examples_text(task, row)
    return "".join(content_of(turn).strip() for turn in example_turns(task, row))


def _too_long_alone(options: Options, tokens: int, context: int, task: Task) -> list[str]:
    """Describe that no row fits; the ranks refuse or skip rows that are not to be truncated."""
    if task.too_long != "truncate":
        return []
    counts = {"--shots": options.shots, "--retrieved": options.retrieved}
    given = [f"{option} {count}" for option, count in counts.items() if count is not None]
    return [
        f"{', '.join(given)}: the shortest row of task {task.name!r} has at least {tokens:,} "
        f"tokens without examples, but the context of the base holds {context:,}, and "
        f"{NOT_TRUNCATED}"
    ]


def _problem(
    option: str, count: int, tokens: int, room: int, context: int, task: Task
) -> list[str]:
    if tokens <= room:
        return []
    fitting = max(0, room * count // tokens)
    return [
        f"{option} {count}: {count} examples and the shortest row of task {task.name!r} have at "
        f"least {tokens + context - room:,} tokens, but the context of the base holds "
        f"{context:,}; lower it ({'none fits' if not fitting else f'at most about {fitting} fit'})"
    ]
