"""Rows of a task: files and tables, checked and held as memory-mapped Arrow. Imports no torch.

``check_rows`` is the preflight: it reads all that a run names and says everything that is wrong,
before a process group or a model is started. ``load_splits`` checks the same and keeps the columns
that the task uses. What grows with the number of rows is on disk.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from trainer.config import DataSource, RunConfig, Task, template_fields
from trainer.errors import BadInput
from trainer.tasks.checks import Problems, merge, render
from trainer.tasks.parts import Part, Said, read_part
from trainer.tasks.selection import (
    Hashes,
    Index,
    Leak,
    find_leaks,
    first_by_hash,
    split_by_hash,
)
from trainer.tasks.sources import find
from trainer.tasks.spill import Spill, chunks

__all__ = [
    "SPLITS",
    "Leaked",
    "Rows",
    "Source",
    "check_rows",
    "gold_target",
    "leaks",
    "load_rows",
    "load_splits",
    "remarks",
    "render",
    "target_text",
]

SPLITS = ("train", "validation", "shifted_validation")
_BATCH = 1000


@dataclass(frozen=True)
class Source:
    """A range of rows that are mixed with others by weight: ``rows[start:stop]``.

    Without weights (``None`` for all sources of a split, never for some) an epoch reads every row
    once, in one shuffled order, as if there were one source.

    With weights an epoch still reads N rows, as many as the split has. Source s gives n_s of them,
    N * weight_s / sum of weights, rounded by largest remainder (ties: the earlier source), so that
    the n_s sum to N. Each source is read in passes of its own: pass k is its rows in an order that
    is a pure function of (seed, s, k), and the passes are laid end to end. Epoch e takes the places
    e * n_s to (e + 1) * n_s of that endless sequence, and shuffles the rows of all sources together
    by (seed, e). So the shares are exact in every epoch, no row of a source is read again before
    all others of that source were, and an epoch is a pure function of (seed, epoch). Small sources
    with large weights are repeated within an epoch, large ones with small weights take several
    epochs to be read once; with weights in proportion to their rows every row is read once.
    (T5's mixing by rate, arXiv 1910.10683 section 3.5.2, with exact shares in place of draws.)

    Attributes:
        start, stop: rows of the split; sources are in order and without gaps.
        weight: positive, or None.
    """

    start: int
    stop: int
    weight: float | None = None


class Rows:
    """Checked rows of one split. ``rows[i]`` holds the columns that the task uses.

    Values are those of the file: nothing is guessed from text that looks like a date or a number.
    Where csv has JSON text for a list (test calls, dialogues, token ids) it is that list; the
    labels of a multi-label row are the text to write.

    Attributes:
        path: the files, as messages name them all together.
        columns: all columns, of the first file.
        digest: of the files' bytes, the weights and which rows were taken; of one whole file, its
            SHA-256 in hex.
        sources: ranges of rows that are mixed by weight.
    """

    def __init__(
        self,
        path: str,
        parts: Sequence[Part],
        sources: Sequence[Source],
        index: Index | None = None,
        chosen: str = "",
    ) -> None:
        self.path = path
        self.columns = parts[0].columns
        self._parts = tuple(parts)
        self._first = list(accumulate(map(len, parts), initial=0))
        self._batches = [(part, batch) for part in parts for batch in part.batches]
        self._starts = list(accumulate((b.num_rows for _, b in self._batches), initial=0))
        self._index = index
        self._all = tuple(sources)
        self._chosen = chosen
        self.sources = self._within(self._all, index)
        self.digest = self._digest()

    @property
    def num_files(self) -> int:
        return len(self._parts)

    def __len__(self) -> int:
        return self._first[-1] if self._index is None else len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, batch, at, _ = self._find(index)
        return next(part.values(batch.slice(at, 1)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, (part, batch) in enumerate(self._batches):
            taken = self._taken(batch, self._starts[number])
            for start in range(0, taken.num_rows, _BATCH):
                yield from part.values(taken.slice(start, _BATCH))

    def where(self, index: int) -> str:
        """``FILE:LINE`` of a row in jsonl and txt, else ``FILE: row N``; both count from 1."""
        part, batch, at, row = self._find(index)
        return part.where(batch, at, row)

    def numbers(self, rows: slice) -> Index:
        """Numbers of some rows among all rows of the files."""
        return np.arange(rows.start, rows.stop) if self._index is None else self._index[rows]

    def hashes(self) -> Iterator[Hashes]:
        """64 bits of the content of every row, in order, a piece at a time."""
        for rows in chunks(len(self)):
            numbers = self.numbers(rows)
            found = np.zeros(len(numbers), np.uint64)
            for part, first, stop in zip(self._parts, self._first, self._first[1:], strict=False):
                inside = (numbers >= first) & (numbers < stop)
                found[inside] = part.hashes[numbers[inside] - first]
            yield found

    def take(self, index: Index, chosen: str) -> Rows:
        """Some of these rows, by their ascending numbers; ``chosen`` says which, for the digest."""
        if self._index is not None:
            spilled = Spill("int64")
            for part in chunks(len(index)):
                spilled.add(self._index[index[part]])
            index = spilled.array()
        return Rows(self.path, self._parts, self._all, index, f"{self._chosen}, {chosen}")

    def _find(self, index: int) -> tuple[Part, Any, int, int]:
        """(part, batch, number in the batch, number in the file) of a row."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.path}")
        row = range(len(self))[index]
        row = row if self._index is None else int(self._index[row])
        number = bisect_right(self._starts, row) - 1
        part, batch = self._batches[number]
        first = self._first[bisect_right(self._first, row) - 1]
        return part, batch, row - self._starts[number], row - first

    def _taken(self, batch: Any, start: int) -> Any:
        if self._index is None:
            return batch
        low, high = np.searchsorted(self._index, [start, start + batch.num_rows])
        return batch.take(self._index[low:high] - start)

    @staticmethod
    def _within(sources: Sequence[Source], index: Index | None) -> tuple[Source, ...]:
        if index is None:
            return tuple(sources)
        edges = [int(np.searchsorted(index, s.start)) for s in sources] + [len(index)]
        return tuple(
            Source(start, stop, source.weight)
            for source, start, stop in zip(sources, edges, edges[1:], strict=False)
        )

    def _digest(self) -> str:
        weights = [source.weight for source in self._all]
        if len(self._parts) == 1 and not any(weights) and not self._chosen:
            return self._parts[0].digest
        edges = [(source.start, source.stop) for source in self._all] if any(weights) else []
        named = [[part.digest for part in self._parts], weights, edges, self._chosen]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def load_rows(sources: str | Sequence[DataSource], task: Task, *, said: Said | None = None) -> Rows:
    """Read and check all rows of some sources, or of one file.

    Args:
        task: its templates, choices and metric say what a row needs.
        said: told how far reading has come.

    Raises:
        BadInput: with every problem, at most ten and how many more there are.
    """
    sources = [DataSource(path=sources)] if isinstance(sources, str) else list(sources)
    named = (split for split in SPLITS if getattr(task, split) == sources)
    reader = _Reader(said)
    rows = reader.rows(sources, task, next(named, ""))
    reader.raise_if_any()
    assert rows is not None
    return rows


def load_splits(task: Task, *, said: Said | None = None) -> dict[str, Rows]:
    """All rows of a task: ``train``, and ``validation`` and ``shifted_validation`` if it has any.

    Raises:
        BadInput: with every problem of all files.
    """
    reader = _Reader(said)
    splits = reader.splits(task)
    reader.raise_if_any()
    return splits


def check_rows(config: RunConfig, *, said: Said | None = None) -> list[str]:
    """Check every row of every task, and keep none.

    Returns:
        What is worth knowing: rows held back for validation, and those that are also in train.

    Raises:
        BadInput: with the problems of all files.
    """
    reader = _Reader(said)
    notes: list[str] = []
    for task in config.tasks:
        splits = reader.splits(task)
        if splits:
            notes += [*remarks(task, splits), *(leak.warning for leak in leaks(task, splits))]
    reader.raise_if_any()
    return notes


def remarks(task: Task, splits: Mapping[str, Rows]) -> list[str]:
    """What is worth saying about where rows came from: many files, shares, rows held back."""
    found = []
    for name, rows in splits.items():
        shares = [source.weight for source in rows.sources]
        if rows.num_files > 1 and (name != "validation" or task.validation is not None):
            found.append(f"task {task.name}: {name}: {len(rows):,} rows of {rows.path}")
        if name == "train" and len(shares) > 1 and all(shares):
            total = sum(share or 0 for share in shares)
            parts = ", ".join(f"{(share or 0) / total:.1%}" for share in shares)
            found.append(f"task {task.name}: {name}: mixed by weight: {parts} of every epoch")
    if task.validation is None and "validation" in splits:
        held, of = len(splits["validation"]), len(splits["validation"]) + len(splits["train"])
        found.append(
            f"task {task.name}: no validation is named, so {held:,} of {of:,} rows are kept for "
            f"it, chosen by a hash of their content (validation_share: {task.kept_share:g})"
        )
    return found


@dataclass(frozen=True)
class Leaked:
    """Rows of a validation split that are also in train: their score is memory, not skill.

    Attributes:
        rows: of the first few, where they stand in the split and in train.
    """

    task: str
    split: str
    count: int
    of: int
    rows: tuple[tuple[str, str], ...]

    @property
    def warning(self) -> str:
        named = "; ".join(f"{here} is {there}" for here, there in self.rows)
        more = ", ..." if self.count > len(self.rows) else ""
        return (
            f"task {self.task}: {self.count} of {self.of} rows of {self.split} are also in train: "
            f"{named}{more}"
        )


def leaks(task: Task, splits: Mapping[str, Rows]) -> list[Leaked]:
    """Splits of a task of which some rows are also in train."""
    found = []
    for name, rows in splits.items():
        if name == "train":
            continue
        train = splits["train"]
        leak: Leak = find_leaks(train.hashes(), rows.hashes())
        if leak.count:
            places = tuple((rows.where(i), train.where(j)) for i, j in leak.rows)
            found.append(Leaked(task.name, name, leak.count, len(rows), places))
    return found


def gold_target(row: dict[str, Any], task: Task) -> str:
    """The value of a row that ``task.choices`` lists: the target's one column, as text."""
    return str(row[template_fields(task.target)[0]])


def target_text(row: Mapping[str, Any], task: Task) -> str:
    """What the base should write: the target, of a dialogue the last answer."""
    if task.messages is not None:
        return str(row[task.messages][-1]["content"])
    return render(task.target, row)


class _Reader:
    """Reads splits; problems of all files are collected before any is raised."""

    def __init__(self, said: Said | None = None) -> None:
        self._said = said
        self._problems: list[str] = []
        self._found: list[Problems] = []

    def raise_if_any(self) -> None:
        problems = [*self._problems, *merge(self._found)]
        if problems:
            raise BadInput(problems)

    def splits(self, task: Task) -> dict[str, Rows]:
        """The splits of a task; none if a file of it has a problem."""
        named = [split for split in SPLITS if getattr(task, split) is not None]
        read = {split: self.rows(getattr(task, split), task, split) for split in named}
        splits = {split: rows for split, rows in read.items() if rows is not None}
        if len(splits) < len(named):
            return {}
        share = task.kept_share
        if share:
            rows = splits["train"]
            kept, held = split_by_hash(rows.hashes, share)
            if not len(kept) or not len(held):
                side = "validation" if len(kept) else "train"
                self._problems.append(
                    f"tasks.{task.name}.validation_share: {share:g} of {len(rows)} rows leaves "
                    f"none for {side}; name a validation file, or set validation_share to "
                    "another share, 0 for no validation"
                )
                return {}
            splits["train"] = rows.take(kept, f"all but a share of {share:g}")
            splits["validation"] = rows.take(held, f"a share of {share:g}")
        for split, rows in splits.items():
            splits[split] = _most(
                rows, task.max_rows if split == "train" else task.max_validation_rows
            )
        return {split: splits[split] for split in SPLITS if split in splits}

    def rows(self, sources: Sequence[DataSource], task: Task, split: str) -> Rows | None:
        """All rows of a split, without the task's own ``max_rows``; None if there is a problem."""
        setting = f"tasks.{task.name}" + (f".{split}" if split else "")
        parts: list[Part] = []
        ends: list[int] = []
        before = len(self._problems), sum(found.count for found in self._found)
        for number, source in enumerate(sources):
            where = f"{setting}[{number}]" if len(sources) > 1 else setting
            try:
                origins = find(source, where, split or "train")
            except BadInput as error:
                self._problems += error.problems
                origins = []
            for origin in origins:
                problems, part = read_part(origin, task, said=self._said)
                self._found.append(problems)
                parts += [part] if part is not None else []
            ends.append(len(parts))
        if before != (len(self._problems), sum(found.count for found in self._found)):
            return None
        return _joined(sources, parts, ends)


def _joined(sources: Sequence[DataSource], parts: Sequence[Part], ends: Sequence[int]) -> Rows:
    """The parts of all sources as one split; each source keeps its own ``max_rows``."""
    groups = [parts[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]
    edges = list(accumulate((sum(map(len, group)) for group in groups), initial=0))
    ranges = [
        Source(start, stop, source.weight)
        for source, start, stop in zip(sources, edges, edges[1:], strict=False)
    ]
    if len(parts) == 1:
        path = parts[0].name
    else:
        path = ", ".join(source.label for source in sources) + f" ({len(parts)} files)"
    rows = Rows(path, parts, ranges)
    if not any(source.max_rows for source in sources):
        return rows
    spilled = Spill("int64")
    for source, group, start in zip(sources, groups, edges, strict=False):
        own = Rows(source.label, group, [])
        taken = _most(own, source.max_rows)
        for part in chunks(len(taken)):
            numbers = taken.numbers(part)
            spilled.add(numbers + start)
    return rows.take(spilled.array(), f"at most {[source.max_rows for source in sources]}")


def _most(rows: Rows, count: int | None) -> Rows:
    if count is None or len(rows) <= count:
        return rows
    return rows.take(first_by_hash(rows.hashes, count), f"at most {count}")
