"""Tables: every value is the one that the same row has in JSON Lines, or its type is refused."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from trainer.config import Task
from trainer.data.dataset import RowDataset
from trainer.data.splits import load_rows
from trainer.runtime.errors import BadInput

CALL = {"id": "c1", "type": "function"}
DIALOGUES: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "1+2?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {**CALL, "function": {"name": "add", "arguments": {"a": 1, "b": [{"c": 2}]}}}
                ],
            },
            {"role": "tool", "name": "add", "content": "3"},
            {"role": "assistant", "content": "3"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {**CALL, "function": {"name": "weather", "arguments": {"city": "Bern"}}}
                ],
            },
            {"role": "tool", "name": "weather", "content": "sun"},
            {"role": "assistant", "content": "Sun"},
        ]
    },
]


def load(path: Path, **settings: Any) -> RowDataset:
    values = {"input": "{text}", "target": "{label}"} if "messages" not in settings else {}
    return load_rows(str(path), Task(name="t", train="x", **{**values, **settings}))


def problem(path: Path, **settings: Any) -> str:
    with pytest.raises(BadInput) as caught:
        load(path, **settings)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def save(folder: Path, text: Any) -> Path:
    path = folder / "d.arrow"
    table = pa.table({"text": text, "label": ["x"] * len(text)})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def test_dialogues_have_no_keys_of_other_rows(tmp_path: Path) -> None:
    """In Arrow each call has the arguments of all calls; a null of another row is not learnt."""
    lines = tmp_path / "d.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in DIALOGUES))
    parquet.write_table(pa.Table.from_pylist(DIALOGUES), tmp_path / "d.parquet")
    listed = datasets.Dataset.from_list(DIALOGUES)
    listed.save_to_disk(tmp_path / "listed")
    mixed = datasets.Dataset.from_list(  # each turn is stored as a JSON text
        DIALOGUES, features=datasets.Features({"messages": datasets.List(datasets.Json())})
    )
    mixed.save_to_disk(tmp_path / "mixed")
    mixed.to_parquet(tmp_path / "mixed.parquet")
    texts = mixed.data.table["messages"].cast(pa.list_(pa.string()))
    parquet.write_table(pa.table({"messages": texts}), tmp_path / "texts.parquet")
    expected = load(lines, messages="messages")
    assert list(expected) == DIALOGUES
    hashes = expected.hashes().tolist()
    for name in ("d.parquet", "listed", "mixed", "mixed.parquet", "texts.parquet"):
        rows = load(tmp_path / name, messages="messages")
        assert list(rows) == DIALOGUES, name
        assert rows.hashes().tolist() == hashes, name


def test_a_null_inside_json_text_is_a_value(tmp_path: Path) -> None:
    turns = [DIALOGUES[0]["messages"][0], dict(DIALOGUES[0]["messages"][1])]
    turns[1]["tool_calls"] = [{"function": {"name": "f", "arguments": {"a": None}}}]
    rows = [{"messages": turns}]
    features = datasets.Features({"messages": datasets.List(datasets.Json())})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "d")
    assert list(load(tmp_path / "d", messages="messages")) == rows


def test_a_test_call_may_expect_null(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": "b", "tests": [{"args": [{"x": 1}], "result": None}]},
        {"text": "a", "label": "b", "tests": [{"args": [{"y": 1}], "result": {"z": 1}}]},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert list(load(tmp_path / "d.parquet", metric="execution")) == rows


DAY = dt.datetime(2020, 1, 2, 3, 4, 5)
VALUES: dict[str, tuple[Any, list[str]]] = {
    "float32": (pa.array([36.6, 1.0, 1e20, 0.1], pa.float32()), ["36.6", "1.0", "1e+20", "0.1"]),
    "float16": (pa.array([np.float16(36.6), np.float16(1)]), ["36.6", "1.0"]),
    "float64": (pa.array([36.6, 1e20]), ["36.6", "1e+20"]),
    "decimal": (
        pa.array([Decimal("12.30"), Decimal(0)], pa.decimal128(20, 8)),
        ["12.30000000", "0.00000000"],
    ),
    "date": (pa.array([dt.date(2020, 1, 2)]), ["2020-01-02"]),
    "seconds": (pa.array([DAY], pa.timestamp("s")), ["2020-01-02T03:04:05"]),
    "zone": (pa.array([DAY], pa.timestamp("ms", "UTC")), ["2020-01-02T03:04:05+00:00"]),
    "nanoseconds": (
        pa.array([-1, 10**18, 0], pa.timestamp("ns")),
        ["1969-12-31T23:59:59.999999999", "2001-09-09T01:46:40", "1970-01-01T00:00:00"],
    ),
    "time": (pa.array([1, 10**9], pa.time64("ns")), ["00:00:00.000000001", "00:00:01"]),
    "uint64": (pa.array([2**64 - 1, 1], pa.uint64()), ["18446744073709551615", "1"]),
    "bool": (pa.array([True, False]), ["True", "False"]),
    "large_string": (pa.array(["a"], pa.large_string()), ["a"]),
    "string_view": (pa.array(["a"], pa.string_view()), ["a"]),
    "dictionary": (pa.array([1.5, 36.6], pa.float32()).dictionary_encode(), ["1.5", "36.6"]),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_of_simple_types(tmp_path: Path, kind: str) -> None:
    column, expected = VALUES[kind]
    assert [str(row["text"]) for row in load(save(tmp_path, column))] == expected


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([dt.timedelta(days=1)]), "column 'text' has type duration[us]"),
        (pa.array([b"x"]), "column 'text' has type binary"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "column 'text' has type map"),
        (pa.array([2**60], pa.timestamp("s")), "column 'text' of type timestamp[s]: "),
        (pa.array([[1.0, float("nan")]]), "column 'text' holds NaN or infinity"),
        (pa.array([[Decimal("1.5")]]), "has type decimal128(2, 1) inside a list or object"),
    ],
)
def test_other_types_are_refused_once(tmp_path: Path, column: Any, words: str) -> None:
    assert words in problem(save(tmp_path, column))


def test_the_same_value_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": 36.6, "label": 2}\n{"text": 1e-7, "label": 3}\n')
    (tmp_path / "d.csv").write_text("text,label\n36.6,2\n1e-07,3\n")
    table = pa.table(
        {"text": pa.array([36.6, 1e-7], pa.float32()), "label": pa.array([2, 3], pa.uint8())}
    )
    parquet.write_table(table, tmp_path / "d.parquet")
    by_format = [load(tmp_path / name) for name in ("d.jsonl", "d.csv", "d.parquet")]
    texts = [[(str(row["text"]), str(row["label"])) for row in rows] for rows in by_format]
    assert texts == [[("36.6", "2"), ("1e-07", "3")]] * 3
    hashes = [rows.hashes().tolist() for rows in by_format]
    assert hashes[0] == hashes[1] == hashes[2]


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.table([["a"], ["b"], ["c"]], names=["text", "text", "label"])
    parquet.write_table(table, tmp_path / "d.parquet")
    assert problem(tmp_path / "d.parquet").endswith("duplicate column 'text'; rename one")


def test_class_numbers_are_the_names_of_their_classes(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": label, "all": datasets.List(label)}
    )
    rows = [{"text": "a", "label": 1, "all": [0, 1]}, {"text": "b", "label": 0, "all": [1]}]
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(tmp_path / "d")
    saved.to_parquet(tmp_path / "d.parquet")
    for path in (tmp_path / "d", tmp_path / "d.parquet"):
        assert [row["label"] for row in load(path, choices=["neg", "pos"])] == ["pos", "neg"]
        with pytest.raises(BadInput) as caught:
            load(path, choices=["0", "1"])
        assert caught.value.problems[0].endswith(
            "label: its values are the names of its classes (neg, pos); tasks.t.choices has '0': "
            "list the names"
        )
        several = load(path, target="{all}", choices=["pos", "neg"], multi_label=True)
        assert [row["all"] for row in several] == ["pos, neg", "pos"]
    unlabelled = datasets.Dataset.from_list([{**rows[0], "label": -1}], features=features)
    unlabelled.to_parquet(tmp_path / "u.parquet")
    assert "-1 is not one of its 2 classes" in problem(tmp_path / "u.parquet")


def test_tools_have_no_keys_of_other_rows(tmp_path: Path) -> None:
    def tool(name: str, **properties: Any) -> dict[str, Any]:
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    add = tool("add", a={"type": "integer"}, b={"type": "integer", "minimum": 0})
    weather = tool("weather", city={"type": "string", "enum": ["Bern"]})
    rows = [{**DIALOGUES[0], "tools": [add]}, {**DIALOGUES[1], "tools": [weather, add]}]
    rows.append({**DIALOGUES[1], "tools": None})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = list(load(tmp_path / "d.jsonl", messages="messages"))
    assert expected[:2] == rows[:2]
    for name in ("d.parquet", "saved"):
        assert list(load(tmp_path / name, messages="messages")) == expected
