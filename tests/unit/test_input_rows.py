"""Rows to predict are read as in training, with or without targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config import Task
from trainer.inference.input_rows import read_rows
from trainer.runtime.errors import BadInput

PLAIN: dict[str, Any] = {"name": "t", "train": "t.jsonl", "input": "{text}", "target": "{label}"}
QUESTION, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "text": (PLAIN, {"text": "a"}, {"label": "b"}),
    "choices": (PLAIN | {"choices": ["b", "c"]}, {"text": "a"}, {"label": "c"}),
    "labels": (
        PLAIN | {"choices": ["b", "c"], "multi_label": True},
        {"text": "a"},
        {"label": ["c"]},
    ),
    "dialogue": (
        {"name": "t", "train": "t.jsonl", "messages": "turns"},
        {"turns": [QUESTION]},
        {"turns": [QUESTION, ANSWER]},
    ),
    "tokens": (
        {"name": "t", "train": "t.jsonl", "tokens": {}},
        {"input_ids": [1, 2]},
        {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]},
    ),
    "code": (PLAIN | {"metric": "execution"}, {"text": "a"}, {"label": "def f(): pass"}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_memory", [True, False])
def test_targets_are_optional(tmp_path: Path, form: str, in_memory: bool) -> None:
    settings, row, target = FORMS[form]
    task = Task.model_validate(settings)
    for rows, has_targets in (([row] * 2, False), ([row | target] * 2, True)):
        path = tmp_path / f"{has_targets}.jsonl"
        path.write_text("".join(json.dumps({"id": "x", **each}) + "\n" for each in rows))
        given = read_rows(rows if in_memory else str(path), task)
        assert given.has_targets is has_targets
        assert len(given.rows) == 2
        assert given.ids == (None if in_memory else ["x", "x"])
        for name, value in row.items():
            kept = given.rows[0][name]
            assert kept[: len(value)] == value if isinstance(value, list) else kept == value


def test_other_formats_have_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    task = Task.model_validate(PLAIN | {"choices": ["b", "c"]})
    (tmp_path / "a.csv").write_text("id,text\n7,one\n8,two\n")
    pq.write_table(pa.table({"id": [7, 8], "text": ["one", "two"]}), tmp_path / "a.parquet")
    for name, ids in (("a.csv", ["7", "8"]), ("a.parquet", [7, 8])):
        given = read_rows(str(tmp_path / name), task)
        assert [row["text"] for row in given.rows] == ["one", "two"]
        assert (given.ids, given.has_targets) == (ids, False)


def test_empty_targets_are_ignored_on_request(tmp_path: Path) -> None:
    task = Task.model_validate(PLAIN | {"choices": ["b", "c"]})
    (tmp_path / "a.csv").write_text("text,label\none,\n")
    with pytest.raises(BadInput, match="label: is empty"):
        read_rows(str(tmp_path / "a.csv"), task)
    assert not read_rows(str(tmp_path / "a.csv"), task, use_targets=False).has_targets


@pytest.mark.parametrize("in_memory", [True, False])
def test_ignored_targets_change_the_key_of_cached_tokens(tmp_path: Path, in_memory: bool) -> None:
    """Otherwise a run that trains on the same file would learn placeholders."""
    task, path = Task.model_validate(PLAIN), tmp_path / "a.jsonl"
    row = {"text": "a", "label": "b"}
    path.write_text(json.dumps(row) + "\n")
    given, ignored = (
        read_rows([row] if in_memory else str(path), task, use_targets=use).rows
        for use in (True, False)
    )
    assert given[0] != ignored[0]
    assert given.digest != ignored.digest


def test_mistakes_have_their_place(tmp_path: Path) -> None:
    task = Task.model_validate(PLAIN)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"txt": "b"}\n{"text": " "}\n')
    with pytest.raises(BadInput) as refused:
        read_rows(str(path), task, setting="--data")
    assert [problem.partition(": ")[0] for problem in refused.value.problems] == [
        f"{path}:3",
        f"{path}:4",
    ]
    path.write_text("")
    with pytest.raises(BadInput, match=r"--data: .*is empty; it has no rows"):
        read_rows(str(path), task, setting="--data")
