"""``summary.json``: versions, older files, unknown keys."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.unit.run_folder import finished_run
from trainer.reporting.mlflow_note import read_results
from trainer.reporting.summary import (
    SCHEMA_VERSION,
    RunSummary,
    load_summary,
    save_summary,
)
from trainer.runtime.errors import BadInput

#: Written by a version before ``schema_version``.
OLDER = Path(__file__).parent / "data" / "summary_without_version.json"


def test_an_older_file_loads_and_keeps_its_keys_and_values(tmp_path: Path) -> None:
    older = json.loads(OLDER.read_text())
    (tmp_path / "summary.json").write_bytes(OLDER.read_bytes())
    summary = load_summary(tmp_path)
    assert summary is not None
    assert summary.schema_version == 0
    assert summary.prompts["triage"].scores["validation_accuracy"] == 1.0
    assert summary.prompts["triage"].stopped is not None
    assert summary.tasks["triage"].hand_written[0].text == "What is wrong with this patient?\n"
    assert summary.memory.peak_gpu_bytes is None
    comparison = summary.tasks["animals"].comparison
    assert comparison is not None
    assert comparison.baseline == "hand_written-2"
    save_summary(tmp_path, summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"schema_version": 1} | older


def test_the_keys_that_scripts_read_are_in_the_model() -> None:
    """The keys that the documentation promises, and their types."""
    summary = RunSummary.model_validate(json.loads(OLDER.read_text()))
    values = (
        summary.throughput.useful_tokens_per_second,
        summary.memory.base_bytes_per_rank,
        summary.memory.peak_rss_bytes,
        summary.communication.gathered_bytes_per_step,
        summary.load.seconds,
        summary.load.bytes_read_per_rank,
        summary.world_size,
        summary.prompts["animals"].best_step,
        summary.prompts["animals"].scores["validation_loss"],
    )
    assert all(value is not None and value > 0 for value in values)
    assert summary.versions["torch"]


def test_keys_of_a_later_version_are_kept_and_ignored(tmp_path: Path) -> None:
    values = json.loads(OLDER.read_text())
    values |= {"schema_version": SCHEMA_VERSION, "new": {"a": 1}}
    values["prompts"]["triage"]["note"] = "text"
    values["memory"]["new_bytes"] = 3
    values["data"]["triage"]["train"]["lengths"] = [1, 2]
    (tmp_path / "summary.json").write_text(json.dumps(values))
    summary = load_summary(tmp_path)
    assert summary is not None
    assert "note" not in summary.prompts["triage"].scores
    save_summary(tmp_path, summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == values


def test_a_newer_schema_is_refused_by_every_reader(tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    values = json.loads((folder / "summary.json").read_text())
    values["schema_version"] = SCHEMA_VERSION + 1
    (folder / "summary.json").write_text(json.dumps(values))
    for read in (load_summary, read_results):
        with pytest.raises(BadInput, match="schema_version 2 is newer than 1"):
            read(folder)


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"status": "finished", "prompts": 1}'])
def test_a_damaged_file_counts_as_missing(tmp_path: Path, content: str) -> None:
    assert load_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text(content)
    assert load_summary(tmp_path) is None


def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path: Path) -> None:
    values = json.loads(OLDER.read_text())
    values["prompts"]["triage"]["validation_loss"] = math.nan
    values["tasks"]["animals"]["comparison"]["difference"] = math.nan
    save_summary(tmp_path, RunSummary.model_validate(values))
    path = tmp_path / "summary.json"
    earlier = json.dumps(values)
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written["prompts"]["triage"]["validation_loss"] is None
    assert written["tasks"]["animals"]["comparison"]["difference"] is None
    for text in (path.read_text(), earlier):
        path.write_text(text)
        summary = load_summary(tmp_path)
        assert summary is not None
        assert math.isnan(summary.prompts["triage"].scores["validation_loss"])
        assert summary.tasks["animals"].comparison is not None
        assert math.isnan(summary.tasks["animals"].comparison.difference)
