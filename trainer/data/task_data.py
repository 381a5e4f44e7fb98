"""The data of a task: its splits as tokens, ready to train on and to score."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.config import Prompt, RunConfig, Task
from trainer.data.dataset import RowDataset
from trainer.data.ingest import OnRows
from trainer.data.label_prefixes import overlapping
from trainer.data.row_validation import render
from trainer.data.splits import SPLITS, LeakedRows, leaks, load_splits, remarks
from trainer.data.teacher import Teacher, merge_warning, teachers_of
from trainer.data.token_table import in_memory
from trainer.data.tokenization.tokenize import (
    Example,
    Progress,
    Tokenized,
    TokenTable,
    check_vocabulary,
    encode_input,
    gold,
    tokenize,
    tokenize_choices,
    unseen,
)
from trainer.runtime.errors import BadInput

#: Shows that files are read: ``with reading() as on_rows: on_rows(file, rows read so far)``.
Reading = Callable[[], AbstractContextManager[OnRows | None]]


class Candidates(Sequence[list[Example]]):
    """``[row][choice]``: some rows of a table that holds ``width`` examples of each row."""

    def __init__(self, table: TokenTable, width: int, kept: Sequence[int]) -> None:
        self.table, self.width, self.kept = table, width, kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first = self.kept[index] * self.width
        return self.table[first : first + self.width]

    def __iter__(self) -> Iterator[list[Example]]:
        return (self[i] for i in range(len(self)))


class CandidatesBehind(Candidates):
    """The same candidates behind a teacher's tokens."""

    def __init__(self, rows: Candidates, teacher: Teacher) -> None:
        super().__init__(rows.table, rows.width, rows.kept)
        self.teacher = teacher

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return found if isinstance(index, slice) else [self.teacher.behind(e) for e in found]


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
    rows: RowDataset
    candidates: Candidates
    gold: list[int]

    def subset(self, indices: Sequence[int]) -> EvalSet:
        """Some of the rows, by their places in this set."""
        table, width, kept = self.candidates.table, self.candidates.width, self.candidates.kept
        return replace(
            self,
            candidates=Candidates(table, width, [kept[i] for i in indices]),
            gold=[self.gold[i] for i in indices],
        )

    def behind(self, teacher: Teacher) -> EvalSet:
        """The rows behind a teacher, whose word embeddings are read as a prompt."""
        return replace(self, candidates=CandidatesBehind(self.candidates, teacher))

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all rows, each with its first candidate."""
        first = np.asarray(self.candidates.kept, np.int64) * self.candidates.width
        return int(self.candidates.table.lengths[first].sum())

    @cached_property
    def label_counts(self) -> list[int]:
        """Tokens of each row's right target."""
        first = np.asarray(self.candidates.kept, np.int64) * self.candidates.width
        counts: list[int] = self.candidates.table.num_labels[first + np.asarray(self.gold)].tolist()
        return counts


@dataclass
class TaskData:
    """A task's rows, as tokens.

    Attributes:
        train_rows: where ``train`` came from.
        counts: of each split: its rows, how many of them were skipped and how many truncated. A
            row of an evaluation is skipped if it is too long behind any of the hard prompts, so
            that all are compared on the same rows.
        leaks: splits that share rows with train.
        remarks: what to say about where the rows came from.
        warnings: what to warn of about how the rows are tokenized.
        teachers: of the prompts that are distilled, by the prompt's name.
    """

    task: Task
    train: TokenTable
    train_rows: RowDataset
    evaluation: dict[str, EvalSet] = field(default_factory=dict)
    hand_written: dict[str, list[EvalSet]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    leaks: list[LeakedRows] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    teachers: dict[str, Teacher] = field(default_factory=dict)


def load_tasks(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    vocab_size: int,
    progress: Progress = unseen,
    reading: Reading = nullcontext,
    splits: Sequence[str] = SPLITS,
    date: datetime.date | None = None,
) -> dict[str, TaskData]:
    """Read and tokenise the tasks of a run.

    Args:
        progress: shows how far tokenising has come.
        reading: shows how far reading has come.
        splits: those that are needed; of the others nothing is tokenised.
        date: the day that chat templates read; None: today.

    Raises:
        BadInput: with the problems of all tasks.
    """
    problems: list[str] = []
    tasks: dict[str, TaskData] = {}
    teachers = teachers_of(config, tokenizer)
    for task in config.tasks:
        of_task = [p for p in config.prompts if p.task == task.name]
        taught = {p.name: teachers[p.name] for p in of_task if p.name in teachers}
        lengths = [p.num_virtual_tokens for p in of_task]
        longest = max((teacher.num_tokens for teacher in taught.values()), default=0)
        room = context_length - max([longest, *lengths])
        try:
            if room < 2:
                if longest > max(lengths):
                    raise BadInput(
                        f"prompts of task {task.name!r}: a teacher of {longest} tokens leaves no "
                        f"room in a context of {context_length}; shorten it"
                    )
                raise BadInput(
                    f"prompts of task {task.name!r}: {max(lengths)} virtual tokens leave no room "
                    f"in a context of {context_length}; lower num_virtual_tokens"
                )
            loader = _TaskLoader(
                task, tokenizer, room, context_length, vocab_size, progress, reading, date
            )
            tasks[task.name] = loader.load(splits)
            tasks[task.name].teachers = taught
            tasks[task.name].warnings += loader.teacher_warnings(tasks[task.name], of_task)
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return tasks


@dataclass
class _TaskLoader:
    """One task on its way from files to tokens."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    room: int
    context_length: int
    vocab_size: int
    progress: Progress
    reading: Reading
    date: datetime.date | None

    def load(self, wanted: Sequence[str]) -> TaskData:
        with self.reading() as on_rows:
            splits = load_splits(self.task, on_rows=on_rows)
        data = TaskData(self.task, in_memory([]), splits["train"])
        for split, rows in splits.items():
            if split not in wanted:
                data.counts[split] = {"rows": len(rows)}
            elif split == "train":
                self._train(data, rows)
            else:
                self._evaluation(data, split, rows)
        data.leaks = leaks(self.task, splits)
        data.remarks = [*remarks(self.task, splits), *self._overlaps(data)]
        for leak in data.leaks:
            data.counts[leak.split]["also_in_train"] = leak.count
            for source in data.sources:
                if source["split"] == leak.split:
                    source["also_in_train"] = leak.rows
        return data

    def teacher_warnings(self, data: TaskData, prompts: Sequence[Prompt]) -> list[str]:
        """What to warn of about the teachers of the task's prompts."""
        row = render(self.task.input, data.train_rows[0])
        found = [
            merge_warning(prompt.name, prompt.teacher, self.tokenizer, row)
            for prompt in prompts
            if prompt.teacher is not None
        ]
        return [warning for warning in found if warning is not None]

    def _train(self, data: TaskData, rows: RowDataset) -> None:
        train = tokenize(
            rows, self.task, self.tokenizer, self.room, date=self.date, progress=self.progress
        )
        check_vocabulary(train.examples, self.vocab_size)
        data.train = train.examples
        self._note(data, "train", rows, train, train.skipped)

    def _note(
        self, data: TaskData, split: str, rows: RowDataset, tokenized: Tokenized, skipped: int
    ) -> None:
        data.sources.append(
            {
                "task": self.task.name,
                "split": split,
                "path": rows.path,
                "rows": len(rows),
                "digest": rows.digest,
            }
        )
        data.counts[split] = {
            "rows": len(rows),
            "skipped": skipped,
            "truncated": tokenized.truncated,
        }
        if tokenized.warning is not None:
            data.warnings.append(f"task {self.task.name}: {split}: {tokenized.warning}")

    def _evaluation(self, data: TaskData, split: str, rows: RowDataset) -> None:
        """The rows of a split without a prompt and behind every hard one; those that all have."""
        likelihood = self.task.scored_by_likelihood
        width = len(self.task.choices or []) if likelihood else 1
        read = [self._read(rows, "", self.room)]
        check_vocabulary(read[0].examples, self.vocab_size)
        read += [self._read(rows, text, self._room_behind(text)) for text in self.task.hand_written]
        numbers = [found.examples.rows_R[::width] for found in read]
        common = numbers[0]
        for found in numbers[1:]:
            common = np.intersect1d(common, found, assume_unique=True)
        if not len(common):
            raise BadInput(
                f"tasks.{self.task.name}.hand_written: no row of {rows.path} fits behind all of "
                f"them; shorten them, or set tasks.{self.task.name}.too_long to truncate"
            )
        right = gold(rows, self.task) if likelihood else [0] * len(rows)
        sets = [
            EvalSet(
                self.task,
                split,
                rows,
                Candidates(found.examples, width, np.searchsorted(number, common).tolist()),
                [right[row] for row in common.tolist()],
            )
            for found, number in zip(read, numbers, strict=True)
        ]
        data.evaluation[split], data.hand_written[split] = sets[0], sets[1:]
        self._note(data, split, rows, read[0], len(rows) - len(common))

    def _overlaps(self, data: TaskData) -> list[str]:
        """Remarks on choices of which one begins the other; with EOS behind them none does."""
        choices = self.task.choices or []
        if self.task.append_eos or not self.task.scored_by_likelihood:
            return []
        pairs = {pair for rows in data.evaluation.values() for pair in overlapping(rows.candidates)}
        return [
            f"task {self.task.name}: choices: {choices[short]!r} begins {choices[long]!r} and "
            f"append_eos is false; {choices[short]!r} is predicted only where the base is more "
            "likely to end or continue in another way than with the longer choice"
            for short, long in sorted(pairs)
        ]

    def _read(self, rows: RowDataset, prefix: str, room: int) -> Tokenized:
        task, tokenizer, progress = self.task, self.tokenizer, self.progress
        if task.scored_by_likelihood:
            return tokenize_choices(rows, task, tokenizer, room, prefix=prefix, progress=progress)
        return tokenize(
            rows, task, tokenizer, room, prefix=prefix, date=self.date, progress=progress
        )

    def _room_behind(self, prefix: str) -> int:
        """Tokens of a row with a hard prompt, which stands where the virtual tokens stand.

        Where rows are cut, as much of their own text is left as behind the virtual tokens.
        """
        if self.task.too_long != "truncate":
            return self.context_length
        words = len(encode_input(self.tokenizer, prefix)) - len(encode_input(self.tokenizer, ""))
        return min(self.context_length, self.room + words)
