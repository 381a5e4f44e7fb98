"""Data of a task: its splits as tokens, for training and for scoring."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from trainer.config import Prompt, RunConfig, Task
from trainer.data.dataset import RowDataset, gold_choices
from trainer.data.ingest import OnRows
from trainer.data.label_prefixes import overlapping
from trainer.data.row_hashing import first_by_hash
from trainer.data.splits import SPLITS, LeakedRows, leaks, load_splits, remarks
from trainer.data.teacher import Teacher, merge_warnings, teachers_of
from trainer.data.token_table import Example, TokenTable, in_memory
from trainer.data.tokenization.tokenize import (
    RowProgress,
    Tokenized,
    check_vocabulary,
    encode_input,
    no_progress,
    tokenize,
)
from trainer.runtime.errors import BadInput

#: Shows the progress of reading: ``with progress() as on_rows: on_rows(file, rows read so far)``.
ReadProgress = Callable[[], AbstractContextManager[OnRows | None]]


@dataclass(frozen=True)
class Candidates(Sequence[list[Example]]):
    """``[row][choice]``: examples of selected rows of a table.

    Attributes:
        width: number of examples of a row in the table.
        kept: indices of the selected rows in the table.
        teacher: if given, examples are tokenized after its text.
    """

    table: TokenTable
    width: int
    kept: Sequence[int]
    teacher: Teacher | None = None

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first = self.kept[index] * self.width
        examples = self.table[first : first + self.width]
        return examples if self.teacher is None else list(map(self.teacher.continued_by, examples))


@dataclass(frozen=True)
class EvalSet:
    """Rows to score: each with one candidate target, or one per choice.

    Attributes:
        candidates: ``[row][choice]``, without rows that were skipped because of their length.
        gold: index of the correct candidate of each row.
        rows: all rows; ``candidates[i][0].row`` is an index into it.
    """

    task: Task
    split: str
    rows: RowDataset
    candidates: Candidates
    gold: list[int]

    def subset(self, indices: Sequence[int]) -> EvalSet:
        """Select rows by their indices in this set."""
        kept = [self.candidates.kept[i] for i in indices]
        return replace(
            self,
            candidates=replace(self.candidates, kept=kept),
            gold=[self.gold[i] for i in indices],
        )

    def with_teacher(self, teacher: Teacher) -> EvalSet:
        """Return the rows as tokenized after a teacher, whose embeddings are used as a prompt."""
        return replace(self, candidates=replace(self.candidates, teacher=teacher))

    @property
    def correct_examples(self) -> list[Example]:
        """The candidate of every row that is its target."""
        return [row[right] for row, right in zip(self.candidates, self.gold, strict=True)]

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens of all rows, each with its first candidate."""
        return int(self.candidates.table.lengths[self._first_examples].sum())

    @cached_property
    def longest(self) -> int:
        """Largest number of tokens of a row, with any candidate."""
        kept, width = np.asarray(self.candidates.kept, np.int64), self.candidates.width
        examples = kept[:, None] * width + np.arange(width)
        return int(self.candidates.table.lengths[examples].max(initial=0))

    @cached_property
    def num_shared(self) -> int:
        """Number of leading tokens that all rows have in common, such as a hard prompt."""
        if self.candidates.teacher is not None:
            return 0  # the tokens differ from those of the table
        return self.candidates.table.num_shared(self._first_examples)

    @cached_property
    def label_counts(self) -> list[int]:
        """Number of tokens of each row's correct target."""
        correct = self._first_examples + np.asarray(self.gold)
        counts: list[int] = self.candidates.table.num_labels[correct].tolist()
        return counts

    @property
    def row_numbers(self) -> list[int]:
        """Index in ``rows`` of every row of this set."""
        numbers: list[int] = np.asarray(self.candidates.table.rows_R)[self._first_examples].tolist()
        return numbers

    @property
    def _first_examples(self) -> NDArray[np.int64]:
        return np.asarray(self.candidates.kept, np.int64) * self.candidates.width


@dataclass
class PlacedRows:
    """Rows of a task as tokenized for a ``Prompt.placement`` inside the dialogue."""

    train: TokenTable
    evaluation: dict[str, EvalSet] = field(default_factory=dict)


@dataclass
class TaskData:
    """All data of a task.

    Attributes:
        train, evaluation: rows as read with prompts at the front, and without a prompt.
        placed: ``Prompt.placement`` -> its rows, for others than ``front``.
        train_samples: ``Prompt.placement`` -> some of the train rows, to score.
        hand_written: split -> its rows after each hard prompt of the task.
        counts: split -> number of rows, and how many were skipped and truncated. A validation row
            is skipped if it is too long after any of the hard prompts, so that all prompts are
            compared on the same rows.
        leaks: splits that share rows with train.
        remarks: notes about the sources of the rows.
        notes, warnings: of tokenization and of updates.
        sources: path, rows and digest of each split.
        teachers: name of a distilled prompt -> its teacher.
    """

    task: Task
    train: TokenTable
    train_rows: RowDataset
    evaluation: dict[str, EvalSet] = field(default_factory=dict)
    hand_written: dict[str, list[EvalSet]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    leaks: list[LeakedRows] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    teachers: dict[str, Teacher] = field(default_factory=dict)
    placed: dict[str, PlacedRows] = field(default_factory=dict)
    train_samples: dict[str, EvalSet] = field(default_factory=dict)

    def train_at(self, placement: str) -> TokenTable:
        """Return the training rows for prompts with this ``Prompt.placement``."""
        assert placement != "auto", "replaced by with_positions"
        return self.train if placement == "front" else self.placed[placement].train

    def evaluation_at(self, placement: str) -> dict[str, EvalSet]:
        """Return the rows of every evaluation for prompts with this ``Prompt.placement``."""
        assert placement != "auto", "replaced by with_positions"
        return self.evaluation if placement == "front" else self.placed[placement].evaluation


def load_tasks(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    vocab_size: int,
    progress: RowProgress = no_progress,
    read_progress: ReadProgress = nullcontext,
    splits: Sequence[str] = SPLITS,
    date: datetime.date | None = None,
    end_ids: Collection[int] = (),
) -> dict[str, TaskData]:
    """Read and tokenize the tasks of a run.

    Args:
        progress: shows the progress of tokenization.
        read_progress: shows the progress of reading.
        splits: splits to tokenize; all are read and checked.
        date: the date that chat templates read; None: today.
        end_ids: tokens at which the base's generation stops.

    Raises:
        BadInput: with the problems of all tasks.
    """
    problems: list[str] = []
    tasks: dict[str, TaskData] = {}
    teachers = teachers_of(config, tokenizer, date)
    for task in config.tasks:
        prompts = [prompt for prompt in config.prompts if prompt.task == task.name]
        of_task = {p.name: teachers[p.name] for p in prompts if p.name in teachers}
        try:
            room = row_room(task, prompts, of_task, context_length)
            positions = sorted({prompt.placement for prompt in prompts} - {"front"})
            loader = _TaskLoader(
                *(task, tokenizer, room, context_length, vocab_size, progress, date, end_ids),
                positions=positions,
                sampled=config.evaluation.train_rows,
            )
            data = loader.load(splits, read_progress)
            data.teachers = of_task
            if "train" in splits:
                data.notes += _repeated_rows(data, config.training.tokens_per_step)
            _check_teachers(data)
            if not task.is_chat:
                data.warnings += merge_warnings(task, prompts, tokenizer, data.train_rows[0])
            tasks[task.name] = data
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return tasks


def _repeated_rows(data: TaskData, tokens_per_step: int) -> list[str]:
    """Note that every update reads all train rows several times, which only takes longer."""
    tokens = int(data.train.own_lengths.sum())
    if tokens_per_step < 2 * tokens:
        return []
    return [
        f"task {data.task.name}: an update reads each of the {len(data.train):,} train rows "
        f"{tokens_per_step / tokens:.1f} times (training.tokens_per_step: {tokens_per_step:,}); "
        f"training.tokens_per_step={tokens} reads them once and is faster"
    ]


def row_room(
    task: Task,
    prompts: Sequence[Prompt],
    teachers: Mapping[str, Teacher],
    context_length: int,
) -> int:
    """Return the maximum tokens of a row after the longest prompt or teacher of a task.

    Raises:
        BadInput: less than two.
    """
    longest_prompt = max((prompt.num_virtual_tokens for prompt in prompts), default=0)
    longest_teacher = max((teacher.num_tokens for teacher in teachers.values()), default=0)
    room = context_length - max(longest_prompt, longest_teacher)
    if room < 2:
        cause, remedy = f"{longest_prompt} virtual tokens leave", "lower num_virtual_tokens"
        if longest_teacher > longest_prompt:
            cause, remedy = f"a teacher of {longest_teacher} tokens leaves", "shorten it"
        raise BadInput(
            f"prompts of task {task.name!r}: {cause} no room in a context of "
            f"{context_length}; {remedy}"
        )
    return room


def _check_teachers(data: TaskData) -> None:
    """Raise ``BadInput`` if rows do not begin with the tokens that a teacher replaces."""
    for name, teacher in data.teachers.items():
        setting = f"prompts.{name}.teacher"
        check_teacher(setting, teacher, data.train_rows, data.train_at(teacher.position))
        for split in data.evaluation_at(teacher.position).values():
            check_teacher(setting, teacher, split.rows, split.candidates.table)


def check_teacher(setting: str, teacher: Teacher, rows: RowDataset, table: TokenTable) -> None:
    """Raise ``BadInput`` if a row does not begin with the tokens that a teacher replaces."""
    example = table.first_without(teacher.replaced)
    if example is not None:
        raise BadInput(
            f"{setting}: {rows.where(example.row)} has a turn of the system, which the teacher "
            "would replace; remove the turns of the system from the rows, or write their text "
            "into the teacher"
        )


@dataclass
class _TaskLoader:
    """Loads one task.

    Attributes:
        room: maximum tokens of a row after the longest prompt.
        sampled: number of train rows to score at the end of the training.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    room: int
    context_length: int
    vocab_size: int
    progress: RowProgress
    date: datetime.date | None
    end_ids: Collection[int]
    positions: Sequence[str] = ()
    sampled: int = 0

    def load(self, needed: Sequence[str], read_progress: ReadProgress) -> TaskData:
        with read_progress() as on_rows:
            splits = load_splits(self.task, on_rows=on_rows)
        data = TaskData(self.task, in_memory([]), splits["train"])
        data.placed = {position: PlacedRows(data.train) for position in self.positions}
        for split, rows in splits.items():
            if split not in needed:
                data.counts[split] = {"rows": len(rows)}
            elif split == "train":
                tokenized = self._tokenize(rows, self.room)
                check_vocabulary(tokenized.examples, self.vocab_size)
                data.train = tokenized.examples
                for position, placed in data.placed.items():
                    placed.train = self._tokenize(rows, self.room, position=position).examples
                self._record(data, "train", rows, tokenized, tokenized.skipped)
                if self.sampled and "validation" in splits:
                    tables = {"front": data.train}
                    tables |= {position: placed.train for position, placed in data.placed.items()}
                    data.train_samples = {
                        position: self._sample(rows, table, position)
                        for position, table in tables.items()
                    }
            else:
                self._load_evaluation(data, split, rows)
        data.leaks = leaks(self.task, splits)
        data.remarks = [*remarks(self.task, splits), *self._overlap_remarks(data)]
        for leak in data.leaks:
            data.counts[leak.split]["also_in_train"] = leak.count
            for source in data.sources:
                if source["split"] == leak.split:
                    source["also_in_train"] = leak.rows
        return data

    def _record(
        self, data: TaskData, split: str, rows: RowDataset, tokenized: Tokenized, skipped: int
    ) -> None:
        name, num_rows = self.task.name, len(rows)
        data.sources.append(
            {
                "task": name,
                "split": split,
                "path": rows.path,
                "rows": num_rows,
                "digest": rows.digest,
            }
        )
        data.counts[split] = {
            "rows": num_rows,
            "skipped": skipped,
            "truncated": tokenized.truncated,
        }
        if tokenized.rewritten:
            data.notes.append(
                f"task {name}: {split}: the chat template rewrites earlier turns in "
                f"{tokenized.rewritten:,} of {num_rows:,} rows; each learned turn there is read "
                "after the text that generation reads before it"
            )
        data.warnings += [f"task {name}: {split}: {text}" for text in tokenized.warnings]

    def _load_evaluation(self, data: TaskData, split: str, rows: RowDataset) -> None:
        """Tokenize a split without a prompt and with every hard prompt; keep common rows."""
        likelihood = self.task.scored_by_likelihood
        width = len(self.task.choices or []) if likelihood else 1
        tables = [self._tokenize(rows, self.room, per_choice=likelihood)]
        check_vocabulary(tables[0].examples, self.vocab_size)
        for text in self.task.hand_written:
            room = self._room_with_prompt(text)
            tables.append(self._tokenize(rows, room, prefix=text, per_choice=likelihood))
        for position in data.placed:
            tables.append(self._tokenize(rows, self.room, position=position, per_choice=likelihood))
        rows_of = [tokenized.examples.rows_R[::width] for tokenized in tables]
        common = reduce(lambda a, b: np.intersect1d(a, b, assume_unique=True), rows_of)
        if not len(common):
            setting, what = "hand_written", "after all of them; shorten them"
            if not self.task.hand_written:
                setting, what = "too_long", "with every position of the prompts; shorten the rows"
            raise BadInput(
                f"tasks.{self.task.name}.{setting}: no row of {rows.path} fits {what}, or set "
                f"tasks.{self.task.name}.too_long to truncate"
            )
        gold = gold_choices(rows, self.task) if likelihood else [0] * len(rows)
        sets = [
            EvalSet(
                self.task,
                split,
                rows,
                Candidates(tokenized.examples, width, np.searchsorted(own, common).tolist()),
                [gold[row] for row in common.tolist()],
            )
            for tokenized, own in zip(tables, rows_of, strict=True)
        ]
        hand_written = len(self.task.hand_written)
        data.evaluation[split], data.hand_written[split] = sets[0], sets[1 : 1 + hand_written]
        for placed, rows_there in zip(data.placed.values(), sets[1 + hand_written :], strict=True):
            placed.evaluation[split] = rows_there
        self._record(data, split, rows, tables[0], len(rows) - len(common))

    def _sample(self, rows: RowDataset, table: TokenTable, position: str) -> EvalSet:
        """Tokenize some train rows for scoring, without generation: choices, or else the loss."""
        metric = "accuracy" if self.task.metric == "accuracy" else "loss"
        task = self.task.model_copy(update={"metric": metric})
        hashes = rows.hashes()[np.unique(table.rows_R)]
        chosen = first_by_hash(hashes, min(self.sampled, len(hashes)))
        rows = rows.take(np.unique(table.rows_R)[chosen], f"at most {self.sampled}")
        likelihood = task.scored_by_likelihood
        width = len(task.choices or []) if likelihood else 1
        tokenized = self._tokenize(rows, self.room, position=position, per_choice=likelihood)
        kept = range(len(tokenized.examples.rows_R) // width)
        gold = gold_choices(rows, task) if likelihood else [0] * len(rows)
        numbers = tokenized.examples.rows_R[::width].tolist()
        candidates = Candidates(tokenized.examples, width, kept)
        return EvalSet(task, "train", rows, candidates, [gold[row] for row in numbers])

    def _overlap_remarks(self, data: TaskData) -> list[str]:
        """Remark on choices that are a prefix of another one, which requires append_eos: false."""
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

    def _tokenize(self, rows: RowDataset, room: int, **options: Any) -> Tokenized:
        return tokenize(
            rows,
            self.task,
            self.tokenizer,
            room,
            date=self.date,
            end_ids=self.end_ids,
            progress=self.progress,
            **options,
        )

    def _room_with_prompt(self, prefix: str) -> int:
        """Return the maximum tokens of a row with a hard prompt, which replaces virtual tokens.

        Truncated rows keep as much of their text as after the virtual tokens.
        """
        if self.task.too_long != "truncate":
            return self.context_length
        tokens = len(encode_input(self.tokenizer, prefix)) - len(encode_input(self.tokenizer, ""))
        return min(self.context_length, self.room + tokens)
