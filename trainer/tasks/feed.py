"""What every step reads: rows of each prompt's task, in an order of the prompt's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer.config import RunConfig, Task
from trainer.errors import BadInput
from trainer.tasks.cursor import Cursor
from trainer.tasks.rows import Rows, load_rows
from trainer.tasks.streams import Piece
from trainer.tasks.tokens import Example, check_vocabulary, gold, tokenize, tokenize_choices

SPLITS = ("train", "validation", "shifted_validation")


@dataclass(frozen=True)
class EvalSet:
    """Rows to score: each with one candidate target, or one per choice.

    Attributes:
        candidates: ``[row][choice]``; a row that was skipped for its length has none here.
        gold: index of the right candidate of each row.
        rows: where the rows came from; ``candidates[i][0].row`` is an index into it.
    """

    task: Task
    split: str
    rows: Rows
    candidates: list[list[Example]]
    gold: list[int]

    @property
    def num_labels(self) -> int:
        """Tokens of all right targets."""
        pairs = zip(self.candidates, self.gold, strict=True)
        return sum(candidates[right].num_labels for candidates, right in pairs)


@dataclass
class TaskData:
    """A task's rows, as tokens."""

    task: Task
    train: list[Example]
    evaluation: dict[str, EvalSet]
    hand_written: dict[str, list[EvalSet]]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)


def load_tasks(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    vocab_size: int,
    splits: Sequence[str] = SPLITS,
) -> dict[str, TaskData]:
    """Read and tokenise the tasks of a run.

    Args:
        splits: those that are needed; others stay empty.

    Raises:
        BadInput: with the problems of all tasks.
    """
    problems: list[str] = []
    tasks: dict[str, TaskData] = {}
    for task in config.tasks:
        lengths = [p.num_virtual_tokens for p in config.prompts if p.task == task.name]
        room = context_length - max(lengths, default=0)
        try:
            if room < 2:
                raise BadInput(
                    f"prompts of task {task.name!r}: {max(lengths)} virtual tokens leave no room "
                    f"in a context of {context_length}; lower num_virtual_tokens"
                )
            tasks[task.name] = _load_task(task, tokenizer, room, vocab_size, splits)
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return tasks


def _load_task(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    vocab_size: int,
    splits: Sequence[str],
) -> TaskData:
    data = TaskData(task, [], {}, {})
    for split in splits:
        path = getattr(task, split)
        if path is None:
            continue
        rows = load_rows(path, task)
        tokenized = tokenize(rows, task, tokenizer, room)
        check_vocabulary(tokenized.examples, vocab_size)
        data.sources.append(
            {
                "task": task.name,
                "split": split,
                "path": path,
                "rows": len(rows),
                "digest": rows.digest,
            }
        )
        data.counts[split] = {
            "rows": len(rows),
            "skipped": tokenized.skipped,
            "truncated": tokenized.truncated,
        }
        if split == "train":
            data.train = tokenized.examples
            continue
        data.evaluation[split] = _eval_set(task, split, rows, tokenizer, room)
        data.hand_written[split] = [
            _eval_set(task, split, rows, tokenizer, room, prefix=text) for text in task.hand_written
        ]
    return data


def _eval_set(
    task: Task,
    split: str,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    prefix: str = "",
) -> EvalSet:
    if task.choices:
        candidates = tokenize_choices(rows, task, tokenizer, room, prefix=prefix)
        right = gold(rows, task)
        kept = [c[0].row for c in candidates]
        return EvalSet(task, split, rows, candidates, [right[row] for row in kept])
    tokenized = tokenize(rows, task, tokenizer, room, prefix=prefix)
    examples = [[example] for example in tokenized.examples]
    return EvalSet(task, split, rows, examples, [0] * len(examples))


class Feed:
    """Hands out the rows of every prompt's next update.

    Each prompt has a cursor of its own, so its rows depend on nothing but its own settings.
    """

    def __init__(self, config: RunConfig, tasks: Mapping[str, TaskData]) -> None:
        self._examples = [tasks[prompt.task].train for prompt in config.prompts]
        self._cursors = [
            Cursor(
                [example.num_tokens for example in examples],
                config.training.tokens_per_step,
                config.prompt_seed(prompt),
            )
            for prompt, examples in zip(config.prompts, self._examples, strict=True)
        ]

    def next_step(self, active: Sequence[bool]) -> list[Piece]:
        """The rows of one step, for every prompt that still trains."""
        pieces: list[Piece] = []
        for k, cursor in enumerate(self._cursors):
            if active[k]:
                rows = cursor.next_rows()
                pieces += [
                    Piece(self._examples[k][row], k, len(pieces) + i) for i, row in enumerate(rows)
                ]
        return pieces

    def state_dict(self) -> list[dict[str, Any]]:
        return [cursor.state_dict() for cursor in self._cursors]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        for cursor, saved in zip(self._cursors, state, strict=True):
            cursor.load_state_dict(saved)
