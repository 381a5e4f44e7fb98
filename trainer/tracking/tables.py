"""Tables of results in the JSON format of ``mlflow.log_table``, which MLflow's pages show."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.evaluation import prediction_files
from trainer.runtime import json_file
from trainer.tracking.run_files import mapping, mappings

#: Rows of a table of predictions, the same ones for all prompts of a task: MLflow compares them
#: side by side.
MAX_ROWS = 100
MAX_TEXT = 2000
#: Tag of a run with the paths of its tables.
TAG = "mlflow.loggedArtifacts"
EVALUATION = (
    *("name", "kind", "score", "low", "high", "difference", "difference_low", "difference_high"),
    *("p_value", "tokens_per_query", "flops_per_query", "bytes", "text"),
)
#: MLflow's comparison groups by the first column and compares the second one.
PREDICTIONS = ("input", "prediction", "target", "correct", "loss", "row")

#: Reads a file of the output folder as rows; columns are the keys of the first one.
ReadTable = Callable[[Path], list[dict[str, Any]]]


def evaluation_rows(path: Path) -> list[dict[str, Any]]:
    """Return one row per task and arm of ``evaluation.json``."""
    tasks = mapping(mapping(json_file.parse_json(path.read_text(encoding="utf-8"))).get("tasks"))
    return [
        {"task": name, "metric": mapping(task).get("metric")} | _selected(arm, EVALUATION)
        for name, task in tasks.items()
        for arm in mappings(mapping(task).get("arms"))
    ]


def prediction_rows(path: Path) -> list[dict[str, Any]]:
    """Return the first ``MAX_ROWS`` records of a prediction file, with shortened texts."""
    records = islice(prediction_files.read(path), MAX_ROWS)
    return [_selected(record, PREDICTIONS) for record in records]


def to_json(rows: Iterable[Mapping[str, Any]]) -> str:
    """Format rows as MLflow writes tables: ``{"columns": [...], "data": [[...]]}``."""
    rows = list(rows)
    columns = list(rows[0]) if rows else []
    data = [[row.get(name) for name in columns] for row in rows]
    return json_file.to_json({"columns": columns, "data": data}, ensure_ascii=False)


def add_to_tag(tag: str | None, path: str) -> str:
    """Return the value of ``TAG`` with one more table."""
    try:
        tables = mappings(json_file.parse_json(tag or "[]"))
    except ValueError:
        tables = []
    if not any(table.get("path") == path for table in tables):
        tables.append({"path": path, "type": "table"})
    return json.dumps(tables)


def _selected(record: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: _shown(record.get(key)) for key in keys}


def _shown(value: Any) -> Any:
    if isinstance(value, float):  # MLflow's pages show all digits
        return float(f"{value:.6g}")
    return value[:MAX_TEXT] if isinstance(value, str) else value
