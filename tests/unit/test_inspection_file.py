"""``inspection.json``: the keys on which scripts rely, and files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.reporting.inspection import (
    INSPECTION_FILE,
    Inspection,
    PromptInspection,
    TokenInspection,
    load_inspection,
)


def _inspection() -> Inspection:
    prompt = PromptInspection(task="triage", tokens=[TokenInspection(index=0)])
    return Inspection(prompts={"soft": prompt})


def test_has_the_documented_keys() -> None:
    prompt = _inspection().model_dump(mode="json")["prompts"]["soft"]
    assert {"tokens", "elicited", "controls", "pruned"} <= set(prompt)
    keys = {"index", "nearest", "norm_percentile", "drift", "leave_one_out", "attention"}
    assert keys <= set(prompt["tokens"][0])
    assert {"random", "initial", "other_task"} <= set(prompt["controls"])


def test_is_read_again(tmp_path: Path) -> None:
    (tmp_path / INSPECTION_FILE).write_text(_inspection().model_dump_json())
    assert load_inspection(tmp_path) == _inspection()


def test_other_files_are_not_read(tmp_path: Path) -> None:
    assert load_inspection(tmp_path) is None
    for content in ("{", "{}", json.dumps(_inspection().model_dump() | {"schema_version": 99})):
        (tmp_path / INSPECTION_FILE).write_text(content)
        assert load_inspection(tmp_path) is None
