"""Read a run's data splits, and make the warnings at the top of its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from trainer.reporting.summary import RowCounts, RunSummary
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json


class DataSplit(BaseModel):
    """One entry of ``datasets.json``, and the row counts of its split.

    Attributes:
        digest: SHA-256 of the file.
        also_in_train: (validation row, train row) of some rows that are in both, as FILE:LINE.
    """

    task: str
    split: str
    path: str | None = None
    rows: int | None = None
    digest: str = ""
    also_in_train: list[tuple[str, str]] = []
    counts: RowCounts = RowCounts()


def data_splits(output_dir: Path, summary: RunSummary) -> list[DataSplit]:
    """Read ``datasets.json``; a missing or damaged file counts as empty."""
    try:
        values = read_json(output_dir / "datasets.json")
        splits = TypeAdapter(list[DataSplit]).validate_python(values)
    except (BadInput, ValidationError):
        return []
    for split in splits:
        split.counts = summary.data.get(split.task, {}).get(split.split, RowCounts())
    return splits


def run_warnings(summary: RunSummary | None, data: Sequence[DataSplit]) -> list[str]:
    """Return warnings about a run and its data, one sentence each."""
    warnings = []
    if summary is None:
        warnings.append("The run did not finish (no summary.json).")
    elif summary.status == "failed":
        warnings.append(f"The run failed: {summary.error or 'see logs/ in the output folder'}.")
    for split in data:
        warnings += _data_warnings(split)
    for name, result in (summary.prompts if summary else {}).items():
        if result.stopped and result.stopped.reason == "diverged":
            warnings.append(
                f"{name}: diverged and was stopped at step {result.stopped.step}; other prompts "
                "continued. A lower learning_rate may help."
            )
        if result.skipped_updates:
            warnings.append(f"{name}: {result.skipped_updates} non-finite updates were skipped.")
    return warnings


def _data_warnings(split: DataSplit) -> list[str]:
    warnings, title = [], split.split.replace("_", " ")
    if leaked := split.counts.also_in_train:
        rows = [f"{row} is {train_row}" for row, train_row in split.also_in_train]
        rows += ["..."] if leaked > len(rows) else []
        warnings.append(
            f"{split.task}: {leaked} of {split.rows} {title} rows also appear in the "
            f"training data ({'; '.join(rows)}); scores may be inflated."
        )
    of = f" of {split.rows}" if split.rows else ""
    for count, reason in (
        (split.counts.skipped, "skipped, too long for the context (tasks.too_long: skip)"),
        (split.counts.truncated, "truncated, cut from the left (tasks.too_long: truncate)"),
    ):
        if count:
            warnings.append(f"{split.task} {title}: {count}{of} rows were {reason}.")
    return warnings
