"""Splits of a task: read, checked, held back, compared. Imports no torch.

``check_rows`` is the preflight: it reads all that a run names and says everything that is wrong,
before a process group or a model is started. ``load_splits`` checks the same and keeps the columns
that the task uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from trainer.config import DataSource, RunConfig, Task
from trainer.data.data_files import find
from trainer.data.dataset import MixtureComponent, RowDataset
from trainer.data.disk_arrays import DiskArrays, chunks
from trainer.data.ingest import IngestedFile, OnRows, read_part
from trainer.data.row_hashing import Leak, find_leaks, first_by_hash, split_by_hash
from trainer.data.row_validation import Problems, merge
from trainer.runtime.errors import BadInput

SPLITS = ("train", "validation", "shifted_validation")


def load_rows(
    sources: str | Sequence[DataSource], task: Task, *, on_rows: OnRows | None = None
) -> RowDataset:
    """Read and check all rows of some sources, or of one file.

    Args:
        task: its templates, choices and metric say what a row needs.
        on_rows: called with a file's name and the number of its rows read so far.

    Raises:
        BadInput: with every problem, at most ten and how many more there are.
    """
    sources = [DataSource(path=sources)] if isinstance(sources, str) else list(sources)
    named = (split for split in SPLITS if getattr(task, split) == sources)
    reader = _SplitReader(on_rows)
    rows = reader.rows(sources, task, next(named, ""))
    reader.raise_if_any()
    assert rows is not None
    return rows


def load_splits(task: Task, *, on_rows: OnRows | None = None) -> dict[str, RowDataset]:
    """All rows of a task: ``train``, and ``validation`` and ``shifted_validation`` if it has any.

    Raises:
        BadInput: with every problem of all files.
    """
    reader = _SplitReader(on_rows)
    splits = reader.splits(task)
    reader.raise_if_any()
    return splits


def check_rows(config: RunConfig, *, on_rows: OnRows | None = None) -> list[str]:
    """Check every row of every task, and keep none.

    Returns:
        What is worth knowing: rows held back for validation, and those that are also in train.

    Raises:
        BadInput: with the problems of all files.
    """
    reader = _SplitReader(on_rows)
    notes: list[str] = []
    for task in config.tasks:
        splits = reader.splits(task)
        if splits:
            notes += [*remarks(task, splits), *(leak.warning for leak in leaks(task, splits))]
    reader.raise_if_any()
    return notes


def remarks(task: Task, splits: Mapping[str, RowDataset]) -> list[str]:
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


def leaks(task: Task, splits: Mapping[str, RowDataset]) -> list[Leaked]:
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


class _SplitReader:
    """Reads splits; problems of all files are collected before any is raised."""

    def __init__(self, on_rows: OnRows | None = None) -> None:
        self._on_rows = on_rows
        self._problems: list[str] = []
        self._found: list[Problems] = []

    def raise_if_any(self) -> None:
        problems = [*self._problems, *merge(self._found)]
        if problems:
            raise BadInput(dict.fromkeys(problems))  # two splits may read one file

    def splits(self, task: Task) -> dict[str, RowDataset]:
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

    def rows(self, sources: Sequence[DataSource], task: Task, split: str) -> RowDataset | None:
        """All rows of a split, without the task's own ``max_rows``; None if there is a problem."""
        setting = f"tasks.{task.name}" + (f".{split}" if split else "")
        parts: list[IngestedFile] = []
        ends: list[int] = []
        before = len(self._problems), len(self._found)
        for number, source in enumerate(sources):
            where = f"{setting}[{number}]" if len(sources) > 1 else setting
            try:
                origins = find(source, where, split or "train")
            except BadInput as error:
                self._problems += error.problems
                origins = []
            for origin in origins:
                problems, part = read_part(origin, task, on_rows=self._on_rows)
                self._found.append(problems)
                parts += [part] if part is not None else []
            ends.append(len(parts))
        if before[0] != len(self._problems) or any(self._found[before[1] :]):
            return None
        return _joined(sources, parts, ends)


def _joined(
    sources: Sequence[DataSource], parts: Sequence[IngestedFile], ends: Sequence[int]
) -> RowDataset:
    """The parts of all sources as one split; each source keeps its own ``max_rows``."""
    groups = [parts[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]
    edges = list(accumulate((sum(map(len, group)) for group in groups), initial=0))
    ranges = [
        MixtureComponent(start, stop, source.weight)
        for source, start, stop in zip(sources, edges, edges[1:], strict=False)
    ]
    if len(parts) == 1:
        path = parts[0].name
    else:
        path = ", ".join(source.label for source in sources) + f" ({len(parts)} files)"
    rows = RowDataset(path, parts, ranges)
    if not any(source.max_rows for source in sources):
        return rows
    spilled = DiskArrays("int64")
    for source, group, start in zip(sources, groups, edges, strict=False):
        own = RowDataset(source.label, group, [])
        taken = _most(own, source.max_rows)
        for part in chunks(len(taken)):
            numbers = taken.numbers(part)
            spilled.add(numbers + start)
    return rows.take(spilled.array(), f"at most {[source.max_rows for source in sources]}")


def _most(rows: RowDataset, count: int | None) -> RowDataset:
    if count is None or len(rows) <= count:
        return rows
    return rows.take(first_by_hash(rows.hashes, count), f"at most {count}")
