"""Rows to predict, from files or memory; their targets are optional. Imports no torch.

Rows are read and checked as in training. Rows without targets get placeholders, so that the same
code reads, tokenizes and scores them; no prediction depends on a placeholder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config import DataSource, Task, template_fields
from trainer.data.column_parsers import NO_LABEL
from trainer.data.data_files import DataFile, find_files
from trainer.data.dataset import MixtureComponent, RowDataset
from trainer.data.ingest import IngestedFile, OnRows, ingest, ingest_by_row
from trainer.data.row_validation import columns_used, merge_problems
from trainer.data.text_readers import FileRecord
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import parse_json

#: Placeholder of a target that may be any text.
ANY_TEXT = "x"
#: Column whose values identify rows in the output.
ID_COLUMN = "id"


@dataclass(frozen=True)
class InputRows:
    """Rows to predict.

    Attributes:
        task: as the rows were read; metric ``execution`` is replaced, because nothing is run.
        has_targets: whether the rows have targets of their own.
        ids: values of ``ID_COLUMN``; None if the rows have no such column.
    """

    task: Task
    rows: RowDataset
    has_targets: bool
    ids: Sequence[Any] | None


@dataclass(frozen=True)
class MemoryRows(DataFile):
    """Rows in memory, with the interface of a file."""

    rows: Sequence[Mapping[str, Any]] = ()

    @property
    def table(self) -> None:
        return None

    def header(self) -> list[str] | None:
        return None

    def records(self, columns: Sequence[str], keep: Collection[str] = ()) -> Iterator[FileRecord]:
        for number, row in enumerate(self.rows, start=1):
            yield FileRecord(number, None, dict(row))

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()


@dataclass(frozen=True)
class UnlabeledFile(DataFile):
    """Rows of another file with placeholders as targets."""

    file: DataFile = field(kw_only=True)
    task: Task = field(kw_only=True)

    def header(self) -> list[str] | None:
        names = self.file.header()
        return None if names is None else list(dict.fromkeys([*names, *_targets(self.task)]))

    def class_names(self, column: str) -> list[str] | None:
        return self.file.class_names(column)

    def records(self, columns: Sequence[str], keep: Collection[str] = ()) -> Iterator[FileRecord]:
        own = [name for name in columns if name not in _targets(self.task)]
        for record in self.file.records(own, keep):
            yield record._replace(values=_with_placeholder(record.values, self.task))

    def digest(self) -> str:
        # Token tables are cached by digest: those of the file itself have its targets.
        return hashlib.sha256(f"without targets {self.file.digest()}".encode()).hexdigest()


def read_rows(
    source: str | Sequence[Mapping[str, Any]],
    task: Task,
    *,
    setting: str = "rows",
    use_targets: bool = True,
    on_rows: OnRows | None = None,
) -> InputRows:
    """Read and check all rows.

    Args:
        source: path of a file in a format of training rows, or rows in memory.
        setting: name of the source in messages.
        use_targets: False: ignore targets, which may then be missing or empty.

    Raises:
        BadInput: with the problems of all rows.
    """
    if task.metric == "execution":  # its column of test calls is not needed
        task = task.model_copy(update={"metric": "exact_match"})
    files = _files(source, setting)
    has_targets = use_targets and all(_has_targets(file, task) for file in files)
    problems, ingested = [], list[IngestedFile]()
    for file in files:
        of_file, rows = _ingest(file, task, on_rows, has_targets=has_targets)
        problems.append(of_file)
        ingested += [rows] if rows is not None else []
    if lines := merge_problems(problems):
        raise BadInput(dict.fromkeys(lines))
    num_rows = sum(map(len, ingested))
    name = files[0].name if len(files) == 1 else f"{source} ({len(files)} files)"
    dataset = RowDataset(name, ingested, [MixtureComponent(0, num_rows)])
    return InputRows(task, dataset, has_targets, _ids(files, task, dataset))


def _files(source: str | Sequence[Mapping[str, Any]], setting: str) -> list[DataFile]:
    if isinstance(source, str):
        return find_files(DataSource(path=source), setting, "validation")
    try:
        rows = parse_json(json.dumps(list(source)))
    except (TypeError, ValueError) as error:
        problem = f"{setting}: a value is not plain data ({error}); use text and numbers"
        raise BadInput(problem) from None
    if not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{setting}: give a list of rows, each a mapping from columns to values")
    return [MemoryRows(setting, (), None, rows)]


def _ingest(file: DataFile, task: Task, on_rows: OnRows | None, *, has_targets: bool) -> Any:
    if not has_targets:
        unlabeled = UnlabeledFile(file.name, file.files, file.hub, file=file, task=task)
        return ingest_by_row(unlabeled, task, on_rows)
    if isinstance(file, MemoryRows):
        return ingest_by_row(file, task, on_rows)
    return ingest(file, task, on_rows=on_rows)


def _targets(task: Task) -> list[str]:
    """Columns that only targets need."""
    if task.tokens is not None:
        return [task.tokens.labels]
    return [
        name for name in template_fields(task.target) if name not in template_fields(task.input)
    ]


def _has_targets(file: DataFile, task: Task) -> bool:
    """Whether the first row of a file has a target."""
    columns = file.header()
    if task.messages is None and columns is not None:
        return set(_targets(task)) <= set(columns)
    first = next(file.records(list(columns_used(task))), None)
    if first is None or first.problem:
        return True  # reported by ``ingest``
    if task.messages is None:
        return set(_targets(task)) <= first.values.keys()
    turns = _parsed(first.values.get(task.messages))
    return not isinstance(turns, list) or not turns or not _is_question(turns[-1])


def _with_placeholder(values: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Return a row with a placeholder as its target."""
    text = task.choices[0] if task.choices else ANY_TEXT
    row = dict(values)
    if task.messages is not None:
        turns = _parsed(row.get(task.messages))
        if isinstance(turns, list) and turns and _is_question(turns[-1]):
            row[task.messages] = [*turns, {"role": "assistant", "content": text}]
    elif task.tokens is not None:
        ids = _parsed(row.get(task.tokens.input_ids))
        if isinstance(ids, list) and ids:
            row[task.tokens.input_ids] = [*ids, ids[-1]]
            row[task.tokens.labels] = [NO_LABEL] * len(ids) + ids[-1:]
            name = task.tokens.attention_mask
            if name is not None and isinstance(mask := _parsed(row.get(name)), list):
                row[name] = [*mask, 1]
    else:
        row |= dict.fromkeys(_targets(task), [text] if task.multi_label else text)
    return row


def _is_question(turn: Any) -> bool:
    """Whether a turn of a dialogue is not an answer of the assistant."""
    turn = _parsed(turn)
    return isinstance(turn, dict) and turn.get("role", turn.get("from")) not in ("assistant", "gpt")


def _parsed(value: Any) -> Any:
    """Parse JSON text, as lists are in csv; return other values unchanged."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _ids(files: Sequence[DataFile], task: Task, rows: RowDataset) -> list[Any] | None:
    if ID_COLUMN not in rows.columns:
        return None
    used = [*columns_used(task), ID_COLUMN]
    return [record.values.get(ID_COLUMN) for file in files for record in file.records(used)]
