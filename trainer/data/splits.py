"""Read, validate, hold out and compare the splits of a task. Imports no torch.

``check_rows`` is the preflight check: it reads all data of a run and reports every mistake before
ranks start. ``load_splits`` makes the same checks and keeps the columns that the task uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from trainer.config import DataSource, RunConfig, Task
from trainer.data.data_files import find_files
from trainer.data.dataset import MixtureComponent, RowDataset
from trainer.data.ingest import IngestedFile, OnRows, ingest
from trainer.data.row_hashing import find_leaks, first_by_hash, split_by_hash
from trainer.data.row_validation import Problems, merge_problems
from trainer.data.sampler import weighted_counts
from trainer.runtime.errors import BadInput, did_you_mean

SPLITS = ("train", "validation", "shifted_validation")


def load_rows(
    sources: str | Sequence[DataSource], task: Task, *, on_rows: OnRows | None = None
) -> RowDataset:
    """Read and check all rows of some sources, or of one file.

    Raises:
        BadInput: with every problem; about ten are listed, the others counted.
    """
    sources = [DataSource(path=sources)] if isinstance(sources, str) else list(sources)
    split = next((split for split in SPLITS if getattr(task, split) == sources), "")
    reader = _SplitReader(on_rows)
    rows = reader.rows(sources, task, split)
    reader.raise_problems()
    assert rows is not None
    return rows


def load_splits(task: Task, *, on_rows: OnRows | None = None) -> dict[str, RowDataset]:
    """Read all splits of a task; raises ``BadInput`` with the problems of all files."""
    reader = _SplitReader(on_rows)
    splits = reader.splits(task)
    reader.raise_problems()
    return splits


def check_rows(
    config: RunConfig,
    *,
    on_rows: OnRows | None = None,
    further: Callable[[Task, Mapping[str, RowDataset]], Sequence[str]] = lambda task, splits: (),
) -> list[str]:
    """Check all rows of a run; raises ``BadInput`` with the problems of all files.

    Args:
        further: returns other problems of a task, given its splits.

    Returns:
        Remarks about the data, and warnings about validation rows that are also in train.
    """
    reader = _SplitReader(on_rows)
    notes: list[str] = []
    for task in config.tasks:
        if splits := reader.splits(task):
            notes += [*remarks(task, splits), *(leak.warning for leak in leaks(task, splits))]
            reader.problems += further(task, splits)
    reader.raise_problems()
    return notes


def remarks(task: Task, splits: Mapping[str, RowDataset]) -> list[str]:
    """Describe the sources of rows: many files, mixture weights, rows held out."""
    lines = []
    for name, rows in splits.items():
        weights = [component.weight for component in rows.components if component.weight]
        if rows.num_files > 1 and (name != "validation" or task.validation is not None):
            lines.append(f"task {task.name}: {name}: {len(rows):,} rows of {rows.path}")
        if name == "train" and 1 < len(weights) == len(rows.components):
            shares = ", ".join(f"{weight / sum(weights):.1%}" for weight in weights)
            lines.append(f"task {task.name}: {name}: mixed by weight: {shares} of every epoch")
            counts = weighted_counts(len(rows), weights)
            for number, (count, weight) in enumerate(zip(counts, weights, strict=True), 1):
                if count == 0:
                    lines.append(
                        f"task {task.name}: {name}: source {number} of {len(weights)} is never "
                        f"read: with weight {weight:g} it has less than one of the {len(rows):,} "
                        "rows of an epoch; raise its weight or remove it"
                    )
    if task.validation is None and "validation" in splits:
        held_out = len(splits["validation"])
        lines.append(
            f"task {task.name}: no validation is named, so {held_out:,} of "
            f"{held_out + len(splits['train']):,} rows are held out for it, selected by a hash of "
            f"their content (validation_share: {task.kept_share:g})"
        )
    return lines


@dataclass(frozen=True)
class LeakedRows:
    """Rows of a validation split that are also in train, which inflates scores.

    Attributes:
        count, total: number of such rows, and of all rows of the split.
        rows: the first few, as (place in the split, place in train).
    """

    task: str
    split: str
    count: int
    total: int
    rows: tuple[tuple[str, str], ...]

    @property
    def warning(self) -> str:
        named = "; ".join(f"{here} is {there}" for here, there in self.rows)
        more = ", ..." if self.count > len(self.rows) else ""
        return (
            f"task {self.task}: {self.count} of {self.total} rows of {self.split} are also in "
            f"train: {named}{more}"
        )


def leaks(task: Task, splits: Mapping[str, RowDataset]) -> list[LeakedRows]:
    """Find the splits of a task that share rows with train."""
    leaked = []
    train = splits["train"]
    for name, rows in splits.items():
        if name == "train":
            continue
        count, first = find_leaks(train.hashes(), rows.hashes())
        if count:
            places = tuple((rows.where(i), train.where(j)) for i, j in first)
            leaked.append(LeakedRows(task.name, name, count, len(rows), places))
    return leaked


class _SplitReader:
    """Reads splits and collects the problems of all files, to raise them together."""

    def __init__(self, on_rows: OnRows | None = None) -> None:
        self._on_rows = on_rows
        self.problems: list[str] = []
        self._file_problems: list[Problems] = []

    def raise_problems(self) -> None:
        problems = [*self.problems, *merge_problems(self._file_problems)]
        if problems:
            raise BadInput(dict.fromkeys(problems))  # two splits may read one file

    def splits(self, task: Task) -> dict[str, RowDataset]:
        """Read the splits of a task; return none if one of its files has a problem."""
        splits: dict[str, RowDataset] = {}
        named = [split for split in SPLITS if getattr(task, split) is not None]
        for split in named:
            rows = self.rows(getattr(task, split), task, split)
            if rows is not None:
                splits[split] = rows
        if len(splits) < len(named):
            return {}
        if share := task.kept_share:
            rows = splits["train"]
            train, validation = split_by_hash(rows.hashes(), share)
            if not len(train) or not len(validation):
                side = "validation" if len(train) else "train"
                self.problems.append(
                    f"tasks.{task.name}.validation_share: {share:g} of {len(rows)} rows leaves "
                    f"none for {side}; name a validation file, or set validation_share to "
                    "another share, 0 for no validation"
                )
                return {}
            splits["train"] = rows.take(train, f"all but a share of {share:g}")
            splits["validation"] = rows.take(validation, f"a share of {share:g}")
        for split, rows in splits.items():
            limit = task.max_rows if split == "train" else task.max_validation_rows
            splits[split] = _at_most(rows, limit)
        return {split: splits[split] for split in SPLITS if split in splits}

    def rows(self, sources: Sequence[DataSource], task: Task, split: str) -> RowDataset | None:
        """Read all rows of a split, before the task's ``max_rows``; None if there is a problem."""
        setting = f"tasks.{task.name}" + (f".{split}" if split else "")
        by_source: list[list[IngestedFile]] = []
        is_valid = True
        for number, source in enumerate(sources):
            where = f"{setting}[{number}]" if len(sources) > 1 else setting
            by_source.append([])
            try:
                files = find_files(source, where, split or "train")
            except BadInput as error:
                self.problems += error.problems
                is_valid = False
                continue
            for file in files:
                problems, ingested = ingest(file, task, on_rows=self._on_rows)
                self._file_problems.append(problems)
                if ingested is None:
                    is_valid = False
                else:
                    by_source[-1].append(ingested)
        if not is_valid:
            return None
        columns = {name for files in by_source for file in files for name in file.columns}
        if unknown := [n for n in task.optional if split == "train" and n not in columns]:
            known = ", ".join(sorted(columns))
            self.problems.append(
                f"tasks.{task.name}.optional: no training row has a column {unknown[0]!r}"
                f"{did_you_mean(unknown[0], sorted(columns))}; columns: {known}"
            )
            return None
        return _join(sources, by_source)


def _join(sources: Sequence[DataSource], by_source: Sequence[list[IngestedFile]]) -> RowDataset:
    """Join the files of all sources into one split; apply each source's ``max_rows``."""
    edges = list(accumulate((sum(map(len, files)) for files in by_source), initial=0))
    components = [
        MixtureComponent(start, stop, source.weight)
        for source, (start, stop) in zip(sources, pairwise(edges), strict=True)
    ]
    files = [file for files in by_source for file in files]
    path = files[0].name
    if len(files) > 1:
        path = ", ".join(source.label for source in sources) + f" ({len(files)} files)"
    rows = RowDataset(path, files, components)
    limits = [source.max_rows for source in sources]
    if not any(limits):
        return rows
    selected = [
        _at_most(RowDataset(source.label, files, []), source.max_rows).numbers + start
        for source, files, start in zip(sources, by_source, edges, strict=False)
    ]
    return rows.take(np.concatenate(selected), f"at most {limits}")


def _at_most(rows: RowDataset, count: int | None) -> RowDataset:
    if count is None or len(rows) <= count:
        return rows
    return rows.take(first_by_hash(rows.hashes(), count), f"at most {count}")
