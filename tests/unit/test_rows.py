"""Data files: what is read is what is written, and every mistake has its place."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import time
import tracemalloc
from datetime import date
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from trainer.config import DataSource, RunConfig, Task
from trainer.data import arrow_reader
from trainer.data.column_parsers import split_labels
from trainer.data.dataset import gold_target
from trainer.data.json_reader import read_jsonl
from trainer.data.row_validation import render
from trainer.data.splits import check_rows, load_rows, load_splits
from trainer.runtime.errors import BadInput

GOOD = [{"text": "a cat", "label": "meat"}, {"text": "a cow", "label": "plants"}]


def task(**settings) -> Task:
    values = {"input": "{text}\nAnswer:", "target": " {label}", "train": "x.jsonl", **settings}
    return Task(name="animals", **values)


def write(folder: Path, name: str, content: str | bytes | list) -> str:
    """A data file; a list becomes JSON lines."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    return str(folder / name)


def problems(path: str, **settings) -> list[str]:
    with pytest.raises(BadInput) as caught:
        load_rows(path, task(**settings))
    return [text.replace(path, Path(path).name) for text in caught.value.problems]


def problem(path: str, **settings) -> str:
    (only,) = problems(path, **settings)
    return only


# Reading


def test_every_format_gives_the_same_rows(tmp_path):
    table = pa.Table.from_pylist(GOOD)
    parquet.write_table(table, tmp_path / "d.parquet")
    paths = [
        write(tmp_path, "d.jsonl", GOOD),
        write(tmp_path, "d.json", json.dumps(GOOD, indent=1)),
        write(tmp_path, "lines.json", "\n".join(map(json.dumps, GOOD))),
        write(tmp_path, "d.csv", "text,label\na cat,meat\na cow,plants\n"),
        write(tmp_path, "d.tsv", "text\tlabel\r\na cat\tmeat\r\n\r\na cow\tplants"),
        str(tmp_path / "d.parquet"),
    ]
    for path in paths:
        rows = load_rows(path, task())
        assert list(rows) == [rows[0], rows[1]] == GOOD, path
        assert rows.columns == ["text", "label"]
        assert rows.digest == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_rows_are_memory_mapped_and_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    rows = load_rows(write(tmp_path, "d.jsonl", GOOD * 700), task())
    assert len(rows) == 1400
    assert list(rows)[1399] == rows[-1] == GOOD[1]
    assert list((tmp_path / "tmp").iterdir()) == []
    with pytest.raises(IndexError):
        rows[1400]


def test_rows_stay_in_memory_where_no_temporary_file_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    assert list(load_rows(write(tmp_path, "d.jsonl", GOOD), task())) == GOOD


def test_where_counts_lines_or_rows(tmp_path):
    jsonl = load_rows(
        write(tmp_path, "d.jsonl", "\n" + json.dumps(GOOD[0]) + "\n" * 3 + json.dumps(GOOD[1])),
        task(),
    )
    assert [jsonl.where(i) for i in (0, 1)] == [f"{tmp_path}/d.jsonl:2", f"{tmp_path}/d.jsonl:5"]
    csv = load_rows(
        write(tmp_path, "d.csv", 'text,label\n"two\nlines",meat\na cow,plants\n'), task()
    )
    assert csv[0]["text"] == "two\nlines"
    assert csv.where(1) == f"{tmp_path}/d.csv: row 2 (line 4)"
    listed = load_rows(write(tmp_path, "d.json", json.dumps(GOOD)), task())
    assert listed.where(1) == f"{tmp_path}/d.json: row 2"


def test_values_are_not_guessed(tmp_path):
    """Arrow's own readers turn dates into timestamps, 01 into 1 and NA into null."""
    rows = [{"text": "2020-01-01", "label": "None"}, {"text": "01", "label": "NA"}]
    assert list(load_rows(write(tmp_path, "d.jsonl", rows), task())) == rows
    csv = "text,label\n2020-01-01,None\n01,NA\n"
    assert list(load_rows(write(tmp_path, "d.csv", csv), task())) == rows


def test_numbers_stay_exact(tmp_path):
    rows = [{"text": "x", "label": value} for value in (1, 2.5, 10**30)]
    loaded = load_rows(write(tmp_path, "d.jsonl", rows), task())
    assert [gold_target(row, task()) for row in loaded] == ["1", "2.5", str(10**30)]
    flags = [{"text": "x", "label": value} for value in (True, False)]
    loaded = load_rows(write(tmp_path, "b.jsonl", flags), task(choices=["True", "False"]))
    assert [gold_target(row, task()) for row in loaded] == ["True", "False"]


def test_byte_order_mark_and_unusual_line_ends_inside_text(tmp_path):
    rows = [{"text": "a\u2028b\u0085c\u00e9", "label": "x"}]
    line = json.dumps(rows[0], ensure_ascii=False)
    for name, text in (
        ("d.jsonl", line),
        ("d.json", f"[{line}]"),
        ("d.csv", "text,label\na\u2028b\u0085cé,x"),
    ):
        path = write(tmp_path, name, b"\xef\xbb\xbf" + text.encode())
        assert list(load_rows(path, task())) == rows


def test_parquet_with_dates_categories_and_other_columns(tmp_path):
    table = pa.table(
        {
            "text": pa.array(["a", "b"]).dictionary_encode(),
            "label": [date(2020, 1, 2), date(2020, 1, 3)],
            "image": [b"\xff", b"\x00"],
            "nested": [[{"x": 1}], None],
        }
    )
    parquet.write_table(table, tmp_path / "d.parquet")
    rows = load_rows(str(tmp_path / "d.parquet"), task())
    assert rows[1] == {"text": "b", "label": "2020-01-03"}
    assert rows.columns == ["text", "label", "image", "nested"]


def test_test_calls_may_be_of_any_shape(tmp_path):
    calls = [{"args": [0, "x"], "result": [None, {"a": 1.5}]}]
    more = [{"args": [[1]], "result": "text"}]
    rows = [{"text": "t", "label": "l", "tests": calls}, {"text": "t", "label": "l", "tests": more}]
    run = task(metric="execution")
    assert [row["tests"] for row in load_rows(write(tmp_path, "d.jsonl", rows), run)] == [
        calls,
        more,
    ]
    csv = 'text,label,tests\nt,l,"[{""args"": [1], ""result"": 2}]"\n'
    assert load_rows(write(tmp_path, "d.csv", csv), run)[0]["tests"] == [{"args": [1], "result": 2}]


def test_names_of_formats(tmp_path):
    """Each text format, compressed or not; .ndjson is another name for .jsonl."""
    lines = "".join(json.dumps(row) + "\n" for row in GOOD)
    contents = {
        "d.jsonl": lines,
        "d.ndjson": lines,
        "D.JSONL": lines,
        "d.json": json.dumps(GOOD),
        "d.csv": "text,label\na cat,meat\na cow,plants\n",
        "d.tsv": "text\tlabel\na cat\tmeat\na cow\tplants\n",
    }
    for name, text in contents.items():
        for path in (
            write(tmp_path, name, text),
            write(tmp_path, f"{name}.gz", gzip.compress(text.encode())),
        ):
            rows = load_rows(path, task())
            assert list(rows) == GOOD, path
            one_per_line = name.lower().endswith(("jsonl", "ndjson"))
            assert rows.where(1).startswith(f"{path}:2" if one_per_line else f"{path}: row 2")
    text = write(tmp_path, "d.txt.gz", gzip.compress(b"one\n\ntwo"))
    rows = load_rows(text, task(input="{text}", target="{text}"))
    assert [row["text"] for row in rows] == ["one", "two"]
    assert rows.where(1) == f"{text}:3"


def test_damaged_gzip_files(tmp_path):
    compressed = gzip.compress("".join(json.dumps(row) + "\n" for row in GOOD * 999).encode())
    for content in (
        compressed[:-20],
        compressed[:40] + b"\0" * 40 + compressed[80:],
        b"no gzip",
        compressed[:-8],
    ):
        path = write(tmp_path, "d.jsonl.gz", content)
        assert "is not a complete gzip file" in problem(path)
    assert "name it as data.jsonl.gz" in problem(write(tmp_path, "d.gz", compressed))
    assert "decompress it (zstd -d)" in problem(write(tmp_path, "d.jsonl.zst", compressed))


def test_a_compressed_file_is_read_as_a_stream(tmp_path):
    """8 MB of rows take little memory."""
    path = tmp_path / "d.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        line = json.dumps({"text": "x" * 2000, "label": "y"}).encode() + b"\n"
        for _ in range(4):
            stream.write(line * 1000)
    tracemalloc.start()
    assert sum(1 for _ in read_jsonl(path)) == 4000
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_that_holds_the_rows(tmp_path, indent):
    path = write(tmp_path, "d.json", json.dumps({"version": 1, "data": GOOD}, indent=indent))
    assert list(load_rows(path, task())) == GOOD
    one = write(tmp_path, "one.json", json.dumps(GOOD[0], indent=indent))
    assert list(load_rows(one, task())) == GOOD[:1]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = write(tmp_path, "row.json", json.dumps({"messages": turns}, indent=indent))
    chat = task(input="", target="", messages="messages")
    assert list(load_rows(row, chat)) == [{"messages": turns}]
    both = write(tmp_path, "both.json", json.dumps({"a": GOOD, "b": GOOD}, indent=indent))
    assert "holds several lists of rows (a, b)" in problem(both)
    for columns in (
        {"text": {"0": "a"}, "label": {"0": "b"}},
        {"text": ["a", "c"], "label": ["b", "b"]},
    ):
        pandas = write(tmp_path, "pandas.json", json.dumps(columns, indent=indent))
        assert "holds columns (text, label), not rows" in problem(pandas)
    misspelled = write(tmp_path, "x.json", json.dumps({"text": "a", "lable": "b"}, indent=indent))
    assert "did you mean 'lable'" in problem(misspelled)


def test_an_object_of_rows_by_key(tmp_path):
    path = write(tmp_path, "d.json", json.dumps({"a": GOOD[0], "b": GOOD[1]}))
    assert problem(path) == (
        "d.json: holds rows by their key (a, b, ...); write a list of objects: list(rows.values())"
    )


def test_python_text_of_a_list_is_named(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path, "d.jsonl", [{"talk": str(turns)}])
    message = problem(path, messages="talk", input="", target="")
    assert message.startswith("d.jsonl:1: talk: is Python's text of a list, not JSON: ")
    assert message.endswith("; write it with json.dumps")


def test_duplicate_keys(tmp_path):
    """Of two values for one key JSON readers keep one, at any depth."""
    call = '{"args": [{"a": 1, "a": 2}], "result": 1}'
    line = f'{{"text": "a", "label": "b", "tests": [{call}]}}'
    for name, content in (("d.jsonl", line), ("d.json", f"[{line}]")):
        messages = problem(write(tmp_path, name, content), metric="execution")
        assert "not valid JSON: duplicate key 'a'" in messages


def test_deep_nesting_is_a_problem_of_its_row(tmp_path):
    deep = f'{{"text": "a", "label": "b", "tests": {"[" * 300}{"]" * 300}}}'
    messages = problem(write(tmp_path, "d.jsonl", deep), metric="execution")
    assert messages.startswith("d.jsonl:1: not readable JSON: nested deeper than 200 levels")


# Templates


def test_render():
    row = {"text": "T", "n": 3, "two words": "W"}
    assert render("{text}\nAnswer:", row) == "T\nAnswer:"
    assert render("{n}{two words}{{text}}{{{n}}}", row) == "3W{text}{3}"
    assert render('{"answer": "{text}"}', row) == '{"answer": "T"}'
    assert render("{text}", {"text": "{n} {{"}) == "{n} {{"
    with pytest.raises(KeyError):
        render("{other}", row)


# Mistakes in files


def test_missing_file_folder_empty_file_and_format(tmp_path):
    write(tmp_path, "train.jsonl", GOOD)
    write(tmp_path, "empty.jsonl", "")
    write(tmp_path, "blank.jsonl", "\n \n")
    write(tmp_path, "head.csv", "text,label\n")
    write(tmp_path, "d.xlsx", "x")
    messages = {
        name: problem(str(tmp_path / name))
        for name in (
            "trian.jsonl",
            "no/train.jsonl",
            "empty.jsonl",
            "blank.jsonl",
            "head.csv",
            "d.xlsx",
        )
    }
    assert "no such file (did you mean 'train.jsonl'?)" in messages["trian.jsonl"]
    assert "there is no folder" in messages["no/train.jsonl"]
    assert "is empty" in messages["empty.jsonl"]
    assert "has no rows" in messages["blank.jsonl"]
    assert "has no rows" in messages["head.csv"]
    assert "'.xlsx' is not known; save it as .csv" in messages["d.xlsx"]
    assert "is a folder; name data files" in problem(str(tmp_path))
    assert "train.jsonl" in problem(str(tmp_path))
    assert "hub" in problem("someone/some_dataset")


def test_rows_without_any_column(tmp_path):
    path = write(tmp_path, "d.jsonl", "{}\n{}\n")
    first, second = problems(str(path))
    assert first == "d.jsonl: no column 'text', which tasks.animals.input uses; columns: none"
    assert "no column 'label'" in second


def test_setting_is_named(tmp_path):
    path = str(tmp_path / "none.jsonl")
    assert problem(path, train="x", validation=path).startswith("tasks.animals.validation: ")


@pytest.mark.fault("malformed rows")
def test_bad_json_names_line_and_column(tmp_path):
    lines = [
        json.dumps(GOOD[0]),
        '{"text": "a", "label" "b"}',
        '{"text": "cut',
        "[1]",
        '"x"',
        "null",
        '{"text": NaN}',
    ]
    messages = problems(write(tmp_path, "d.jsonl", "\n".join(lines)))
    assert messages[0].startswith(
        "d.jsonl:2: not valid JSON at column 23: Expecting ':' delimiter: near "
    )
    assert messages[1].startswith("d.jsonl:3: not valid JSON at column 10: Unterminated string")
    assert messages[2].startswith("d.jsonl:4: is a list, [1]; a row is an object")
    assert messages[3].startswith("d.jsonl:5: is text, 'x'")
    assert messages[4].startswith("d.jsonl:6: is null")
    assert messages[5].startswith("d.jsonl:7: not valid JSON: NaN is not JSON")
    assert len(messages) == 6


def test_a_pretty_printed_object_is_one_problem(tmp_path):
    text = problem(write(tmp_path, "d.jsonl", json.dumps(GOOD, indent=2)))
    assert "JSON Lines file has one complete object per line (a list: name it .json)" in text


def test_bad_json_list_names_line(tmp_path):
    messages = problem(write(tmp_path, "d.json", '[\n {"text": "a",\n "label": }\n]'))
    assert messages.startswith("d.json:3: not valid JSON at column 11")


@pytest.mark.fault("malformed rows")
def test_bad_utf8_names_line_and_column(tmp_path):
    bad = b'{"text": "caf\xe9", "label": "x"}\n'
    messages = problem(write(tmp_path, "d.jsonl", json.dumps(GOOD[0]).encode() + b"\n" + bad))
    assert messages == (
        'd.jsonl:2: not UTF-8 at column 14: byte 0xe9 after \'{"text": "caf\'; save it as UTF-8, '
        "for example by iconv -f windows-1252 -t utf-8 FILE > NEW_FILE"
    )
    assert problem(write(tmp_path, "d.csv", b"text,label\ncaf\xe9,x\n")).startswith(
        "d.csv:2: not UTF-8"
    )
    utf16 = problems(write(tmp_path, "u.jsonl", json.dumps(GOOD[0]).encode("utf-16")))
    assert "UTF-16" in utf16[0]


def test_half_a_surrogate_pair(tmp_path):
    messages = problem(write(tmp_path, "d.jsonl", '{"text": "a \\ud83d", "label": "x"}\n'))
    assert messages.startswith('d.jsonl:1: text: holds half a character, "\\ud83d"')


def test_a_column_missing_from_a_file_is_reported_once(tmp_path):
    rows = [{"text": "x", "lable": "y"}] * 30
    expected = (
        "no column 'label', which tasks.animals.target uses; columns: text, lable "
        "(did you mean 'lable'?)"
    )
    assert problem(write(tmp_path, "d.jsonl", rows)) == f"d.jsonl: {expected}"
    assert problem(write(tmp_path, "d.csv", "text,lable\na,b\n")) == f"d.csv: {expected}"
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert problem(str(tmp_path / "d.parquet")) == f"d.parquet: {expected}"


def test_missing_column_of_some_rows(tmp_path):
    messages = problems(
        write(tmp_path, "d.jsonl", [*GOOD, {"text": "x", "Label": "y"}, {"text": "z"}])
    )
    assert messages[0].startswith("d.jsonl:3: no column 'label'")
    assert "did you mean 'Label'?" in messages[0]
    assert messages[1].startswith("d.jsonl:4: no column 'label'")


@pytest.mark.parametrize(
    ("name", "text", "separator"),
    [
        ("d.csv", "text;label\na;b\n", "';'"),
        ("d.csv", '\n"text";"label"\r\n"Hello; you, there";b\r\n', "';'"),
        ("d.csv", "sep=;\r\ntext;label\r\na, b;x\r\n", "';'"),
        ("d.csv", "text\tlabel\na\tb\n", "'\\t'"),
        ("d.tsv", "text,label\na,b\n", "','"),
    ],
)
def test_wrong_delimiter(name, text, separator, tmp_path):
    message = problem(write(tmp_path, name, text))
    assert f"{name}:1: the columns are separated by {separator}; separate the fields" in message
    assert "commas (.csv) or tabs (.tsv)" in message


def test_one_column_has_no_delimiter(tmp_path):
    path = write(tmp_path, "d.csv", '"text; of a note"\na\n')
    assert "columns: text; of a note" in problems(path)[0]


@pytest.mark.parametrize(
    ("start", "remedy"),
    [
        (gzip.compress(b"text,label\na,b\n"), "it is compressed with gzip; add .gz to its name"),
        (b"PK\x03\x04\x14\xff", "it is an Excel workbook or a zip archive; save it as .csv"),
        (b"PAR1\x15\xff", "it is a parquet file; name it .parquet"),
    ],
    ids=["gzip", "zip", "parquet"],  # the bytes of gzip contain the time
)
def test_a_file_of_another_format_is_named(start, remedy, tmp_path):
    for name in ("d.csv", "d.jsonl", "d.txt"):
        assert remedy in problems(write(tmp_path, name, start))[0]


@pytest.mark.fault("malformed rows")
def test_null_empty_and_nested_values_are_refused(tmp_path):
    rows = [
        {"text": None, "label": "x"},
        {"text": " \n", "label": "x"},
        {"text": ["a", "b"], "label": "x"},
        {"text": "a", "label": ""},
    ]
    assert problems(write(tmp_path, "d.jsonl", rows)) == [
        "d.jsonl:1: text: is null; give it a value or remove the row",
        "d.jsonl:2: text: is empty, so the input has no text; fill it or remove the row",
        "d.jsonl:3: text: is a list, ['a', 'b']; a template takes text or a number",
        "d.jsonl:4: label: is empty, so the target has no text; fill it or remove the row",
    ]
    assert "d.csv: row 2 (line 3): label: is empty" in problem(
        write(tmp_path, "d.csv", "text,label\na,b\nc,\n")
    )
    table = pa.table({"text": [1.0, float("nan")], "label": ["a", "b"]})
    parquet.write_table(table, tmp_path / "d.parquet")
    assert problem(str(tmp_path / "d.parquet")).startswith("d.parquet: row 2: text: is NaN")


def test_an_optional_field_may_be_empty(tmp_path):
    path = write(tmp_path, "d.jsonl", [{"context": "", "text": "q", "label": "a"}])
    assert len(load_rows(path, task(input="{context}\n{text}"))) == 1
    path = write(tmp_path, "e.jsonl", [{"context": "", "text": " ", "label": "a"}])
    assert "context and text: are empty" in problem(path, input="{context}\n{text}")


def test_optional_columns_may_be_missing(tmp_path):
    settings = {"input": "{text}\n{context}", "optional": ["context"]}
    contexts = [{"context": "c"}, {"context": ""}, {"context": None}, {}]
    rows = [{"text": str(i), "label": "a", **context} for i, context in enumerate(contexts)]
    path = write(tmp_path, "d.jsonl", rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for file in (path, str(tmp_path / "d.parquet")):
        read = load_rows(file, task(**settings))
        assert [row["context"] for row in read] == ["c", "", "", ""]
        assert render("{text}\n{context}\n", read[3]) == "3\n\n"
    assert problems(path, input="{text}\n{context}")[0].startswith("d.jsonl:3: context: is null")
    empty = write(
        tmp_path, "e.jsonl", [{"text": " ", "label": "a"}, {"context": "c", "label": "a"}]
    )
    first, second = problems(empty, **settings)
    assert first.startswith("e.jsonl:1: text and context: are empty, so the input has no text")
    assert second.startswith("e.jsonl:2: no column 'text'")


def test_a_misspelled_optional_column_is_refused(tmp_path):
    path = write(tmp_path, "d.jsonl", [{"text": "t", "label": "a", "context": "c"}])
    misspelled = task(train=path, input="{text}{contxet}", optional=["contxet"])
    with pytest.raises(BadInput) as caught:
        load_splits(misspelled)
    assert caught.value.problems == [
        "tasks.animals.optional: no training row has a column 'contxet' (did you mean 'context'?); "
        "columns: context, label, text"
    ]


@pytest.mark.fault("malformed rows")
def test_mixed_types_name_the_deviating_row(tmp_path):
    rows = [{"text": "x", "label": label} for label in ("a", "b", 3, True)]
    assert problems(write(tmp_path, "d.jsonl", rows)) == [
        "d.jsonl:3: label: 3 is a number, other rows have text; put it in quotes",
        "d.jsonl:4: label: True is a truth value, other rows have text; put it in quotes",
    ]


def test_other_columns_do_not_matter(tmp_path):
    rows = [{**GOOD[0], "id": 1, "note": None}, {**GOOD[1], "id": "two"}]
    assert len(load_rows(write(tmp_path, "d.jsonl", rows), task())) == 2


def test_whole_numbers_are_choices_however_they_are_written(tmp_path):
    for values, choices in (([1.0, 2], ["1", "2"]), ([1, 2.0], ["1.0", "2.0"])):
        rows = [{"text": "x", "label": value} for value in values]
        loaded = load_rows(write(tmp_path, "d.jsonl", rows), task(choices=choices))
        assert [gold_target(row, task()) for row in loaded] == choices
    csv = write(tmp_path, "d.csv", "text,label\nx,1.0\nx,-2.00\nx,1\n")
    loaded = load_rows(csv, task(choices=["1", "-2"]))
    assert [render(" {label}", row) for row in loaded] == [" 1", " -2", " 1"]
    parquet.write_table(pa.table({"text": ["x"], "label": [1.0]}), tmp_path / "d.parquet")
    assert load_rows(str(tmp_path / "d.parquet"), task(choices=["1", "2"]))[0]["label"] == "1"
    assert "'1.5' is not one of" in problem(
        write(tmp_path, "e.csv", "text,label\nx,1.5\n"), choices=["1", "2"]
    )
    flags = write(tmp_path, "f.jsonl", [{"text": "x", "label": value} for value in (True, False)])
    loaded = load_rows(flags, task(choices=["true", "false"]))
    assert [row["label"] for row in loaded] == ["true", "false"]


def test_choices_are_compared_as_text(tmp_path):
    rows = [{"text": "x", "label": label} for label in (1, 2, 3)]
    messages = problem(write(tmp_path, "d.jsonl", rows), choices=["1", "2"])
    assert messages == "d.jsonl:3: label: '3' is not one of tasks.animals.choices: '1', '2'"
    rows = [{"text": "x", "label": label} for label in ("meat", "plants ", "Plants")]
    messages = problems(write(tmp_path, "e.jsonl", rows), choices=["meat", "plants"])
    assert messages[0].startswith("e.jsonl:2: label: 'plants ' is not one of")
    assert all(text.endswith("(did you mean 'plants'?)") for text in messages)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "tests: is null"),
        ([], "tests: [] is not a list of test calls"),
        ("[1", "tests: is not JSON"),
        ([{"args": [1]}], "tests: [0] is {'args': [1]}; a test call has args and result"),
        ([{"args": 1, "result": 1}], "tests: [0].args is 1, not a list"),
    ],
)
def test_malformed_test_calls(tmp_path, value, expected):
    path = write(tmp_path, "d.jsonl", [{**GOOD[0], "tests": value}])
    assert problem(path, metric="execution").startswith(f"d.jsonl:1: {expected}")


def test_an_integer_of_too_many_digits(tmp_path):
    line = '{"text": 1' + "0" * 5000 + ', "label": "b"}\n'
    for name in ("d.jsonl", "d.json"):
        messages = problem(write(tmp_path, name, line))
        assert messages.endswith("an integer of 5,001 digits is too long; put it in quotes")


def test_csv_mistakes(tmp_path):
    ragged = problems(write(tmp_path, "r.csv", "text,label\na,b\na, b,c\na\n"))
    assert ragged[0].startswith("r.csv: row 2 (line 3): has 3 fields where the header has 2")
    assert ragged[1].startswith("r.csv: row 3 (line 4): has 1 fields")
    open_quote = problem(write(tmp_path, "q.csv", 'text,label\na,b\n"never,closed\nx,y\n'))
    assert open_quote.startswith('q.csv:3: not valid csv: a quote (") is opened but not closed')
    returns = problem(write(tmp_path, "cr.csv", "text,label\ra,b\r"))
    assert returns.endswith("carriage return alone; save it with newlines at line ends")
    assert "duplicate column 'text'" in problem(
        write(tmp_path, "t.csv", "text,label,text\na,b,c\n")
    )
    escaped = problem(write(tmp_path, "e.csv", 'text,label\n"a \\"b\\" c",x\n'))
    assert 'write "" for a quote (not \\"), and put the text in quotes' in escaped
    unnamed = write(tmp_path, "u.csv", "label,text,,\nb,a,,\n")
    assert load_rows(unnamed, task())[0] == {"text": "a", "label": "b"}
    long = write(tmp_path, "l.csv", f"text,label\n{'x' * 200_000},b\n")
    assert len(load_rows(long, task())[0]["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "text", "column"),
    [
        ("d.csv", "text,label\n" + '"bad,b\n' + "x,y\n" * 99 + '12",b\n', "text"),
        ("d.csv", "label,text\n" + 'b,"bad\n' + "x,y\n" * 99 + 'b,12"\n', "text"),
        ("d.tsv", "text\tlabel\n" + '"bad\tb\r\n' + "x\ty\r\n" * 99 + '12"\tb\r\n', "text"),
        ("d.tsv", "a\ttext\tb\n" + '1\t"bad\t2\n' + "x\ty\tz\n" * 99 + '1\t12"\tb\n', "text"),
    ],
)
def test_many_rows_inside_quotes_are_refused(name, text, column, tmp_path):
    message = problem(write(tmp_path, name, text))
    assert message.startswith(
        f"{name}: row 1 (line 2): {column}: begins with a quote and ends in line 102; the lines "
        "between look like rows: "
    )
    remedy = "quoting=3).to_json(" if name == "d.tsv" else 'write "" for a quote'
    assert remedy in message


def test_a_quote_that_is_not_closed_is_refused(tmp_path):
    text = 'text,label\n"so, good,a\nyes,b\n12"",b\n'
    message = problem(write(tmp_path, "d.csv", text))
    assert message.startswith('d.csv:2: not valid csv: a quote (") is opened but not closed')


POEM = "".join(f"line {i}, of many\n" for i in range(200))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.csv", 'text,label\n"Dear Bob,\nthanks",a\nx,b\n'),
        ("d.csv", 'text,label\n"so,a\nthanks",a\nx,b\n'),
        ("d.csv", 'text,label\n"1,5\n2,5\n3,5\nyes",5\n"3,5\n2",b\n'),
        ("d.csv", f'text,label\n"{POEM}",a\nx,b\n'),
        ("d.csv", f'label,text\na,"{POEM}"\nb,x\n'),
        ("d.csv", 'text\n"a\nb\n' + "c\n" * 200 + 'd"\nx\n'),
        ("d.tsv", 'label\ttext\na\t"def f():\n\treturn 1\n"\nb\t"def f():\n\treturn 1"\n'),
        ("d.tsv", 'text\tlabel\n"Name\tAge\nBob\t5\nEve"\ta\nx\tb\n'),
        ("d.tsv", 'label\ttext\na\t"one\n\ntwo"\nb\tHe said "no"\n'),
    ],
)
def test_texts_of_several_lines_are_read(name, text, tmp_path):
    settings = {} if "label" in text else {"target": " {text}"}
    assert len(load_rows(write(tmp_path, name, text), task(**settings))) == 2


def test_a_tsv_with_plain_quotes_names_the_remedy(tmp_path):
    path = write(tmp_path, "d.tsv", 'text\tlabel\n"Great\ta\nbad\tb\n"Other" one\ta\n')
    message = problem(path)
    assert message.startswith(
        'd.tsv:2: not valid csv: a field begins with a quote ("), but text follows its closing '
        "quote that ends in line 4; if the quotes are plain characters, convert the file: "
        'pandas.read_csv(FILE, sep="\\t", quoting=3).to_json("NEW.jsonl", orient="records", '
    )


def test_a_repeated_header_is_not_a_row(tmp_path):
    message = problem(write(tmp_path, "d.csv", "text,label\na,x\ntext,label\nb,y\n"))
    assert message.startswith("d.csv: row 2 (line 3): repeats the first line, which names the")


def test_damaged_parquet(tmp_path):
    assert "is not a complete parquet file" in problem(write(tmp_path, "d.parquet", b"PAR1 no"))
    parquet.write_table(
        pa.table({"text": ["abc"] * 5000, "label": list(map(str, range(5000)))}),
        tmp_path / "e.parquet",
    )
    data = bytearray((tmp_path / "e.parquet").read_bytes())
    data[200:9000] = b"\xff" * 8800
    assert "write it again" in problem(write(tmp_path, "e.parquet", bytes(data)))


def test_equal_problems_of_rows_are_one_line(tmp_path):
    rows = [{"text": "x", "label": None}] * 25
    only = problem(write(tmp_path, "d.jsonl", rows))
    assert only == "d.jsonl:1 and 24 more rows: label: is null; give it a value or remove the row"
    rows = (
        [{"text": "x", "label": "y"}] * 30 + [{"text": "x", "label": 1}] * 12 + [{"text": "x"}] * 2
    )
    messages = problems(write(tmp_path, "e.jsonl", rows))
    assert messages == [
        "e.jsonl:31 and 11 more rows: label: 1 is a number, other rows have text; put it in quotes",
        "e.jsonl:43 and 1 more row: no column 'label', which tasks.animals.target uses; columns: "
        "text",
    ]


@pytest.mark.fault("malformed rows")
def test_ten_problems_and_how_many_more(tmp_path):
    rows = [{"text": "x", "label": f"wrong{i // 2}"} for i in range(50)]
    messages = problems(write(tmp_path, "d.jsonl", rows), choices=["a", "b"])
    assert len(messages) == 11
    assert messages[0].startswith("d.jsonl:1 and 1 more row: label: 'wrong0' is not one of")
    assert messages[-1] == "d.jsonl: and 30 more"


def test_a_column_that_no_row_has_comes_first(tmp_path):
    """However many rows have other mistakes."""
    for name in ("a", "b", "c"):
        rows = [{"txet": "x", "label": f"wrong{i}"} for i in range(60)]
        write(tmp_path, f"{name}.jsonl", rows)
    messages = problems(str(tmp_path / "a.jsonl"), choices=["a", "b"])
    assert messages[0].startswith("a.jsonl: no column 'text', which tasks.animals.input uses")
    assert messages[0].endswith("(did you mean 'txet'?)")
    with pytest.raises(BadInput) as caught:
        load_rows(str(tmp_path / "*.jsonl"), task(choices=["a", "b"]))
    first, *rest = caught.value.problems
    assert first.startswith(f"{tmp_path}/a.jsonl and 2 more files: no column 'text', which")
    assert len(rest) == 3 * (3 + 1)


# The preflight


def run_config(*tasks: dict) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": "out",
            "base": {"model": "m"},
            "tasks": [{"input": "{text}", "target": "{label}", **task} for task in tasks],
            "prompts": [{"name": "p", "task": tasks[0]["name"]}],
            "training": {"steps": 1},
        }
    )


def test_check_rows_reports_every_file(tmp_path):
    good = write(tmp_path, "good.jsonl", GOOD)
    bad = write(tmp_path, "bad.jsonl", [{"text": "x", "label": ""}] * 20)
    worse = write(tmp_path, "worse.jsonl", [*GOOD, {"text": None, "label": "x"}])
    check_rows(run_config({"name": "a", "train": good, "validation": good}))
    with pytest.raises(BadInput) as caught:
        check_rows(
            run_config(
                {"name": "a", "train": good, "validation": bad},
                {
                    "name": "b",
                    "train": worse,
                    "validation": good,
                    "shifted_validation": str(tmp_path / "none.jsonl"),
                },
            )
        )
    messages = caught.value.problems
    assert messages[0].startswith("tasks.b.shifted_validation: ")
    assert any(text.startswith(f"{bad}:1 and 19 more rows: label: is empty") for text in messages)
    assert messages[-1].startswith(f"{worse}:3: text: is null")


def test_check_rows_is_fast_and_imports_no_torch(tmp_path):
    path = write(tmp_path, "d.jsonl", [*GOOD * 3000, {"text": "x", "label": None}])
    parquet.write_table(pa.Table.from_pylist(GOOD), tmp_path / "d.parquet")
    config = run_config({"name": "a", "train": path, "validation": str(tmp_path / "d.parquet")})
    code = f"""
import sys
from trainer.config import RunConfig
from trainer.data.splits import check_rows, load_rows
config = RunConfig.model_validate_json({config.model_dump_json()!r})
try:
    check_rows(config)
except ValueError as error:
    print(error)
load_rows(config.tasks[0].validation, config.tasks[0])
print(sorted({{"torch", "transformers", "deepspeed", "mlflow"}} & set(sys.modules)))
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{path}:6001: label: is null; give it a value or remove the row\n[]\n"
    assert done.stderr == ""
    assert time.monotonic() - start < 20  # about 2 s on an idle machine


# Several labels


LABELS = {"choices": ["red", "green", "blue"], "multi_label": True, "metric": "f1"}


def test_labels_of_a_row_are_written_in_the_order_of_the_choices(tmp_path):
    rows = [{"text": "x", "label": label} for label in (["blue", "red", "blue"], ["green"])]
    loaded = load_rows(write(tmp_path, "d.jsonl", rows), task(**LABELS))
    assert [row["label"] for row in loaded] == ["red, blue", "green"]
    csv = load_rows(
        write(tmp_path, "d.csv", 'text,label\nx,"[""blue"",""red""]"\n'), task(**LABELS)
    )
    assert csv[0]["label"] == "red, blue"
    other = load_rows(str(tmp_path / "d.jsonl"), task(**LABELS, label_separator=" | "))
    assert other[0]["label"] == "red | blue"


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("red", "label: 'red' is text; a multi-label row has a list"),
        ([], "label: [] is not a list of labels"),
        (["red", "Green"], "label: 'Green' is not one of tasks.animals.choices: 'red', 'green'"),
    ],
)
def test_malformed_labels(tmp_path, label, expected):
    path = write(tmp_path, "d.jsonl", [{"text": "x", "label": label}])
    assert problem(path, **LABELS).startswith(f"d.jsonl:1: {expected}")


@pytest.mark.parametrize(
    ("target", "text", "labels"),
    [
        (" {label}", " red, blue", ["red", "blue"]),
        (" {label}", "red,blue,red", ["red", "blue"]),
        (" {label}", "", []),
        (" {label}", "red blue", ["red blue"]),
        ("Colours: {label}.", "Colours: red, green.", ["red", "green"]),
        ("Colours: {label}.", "red, purple", ["red", "purple"]),
    ],
)
def test_labels_of_a_written_text(target, text, labels):
    assert split_labels(text, task(**LABELS, target=target)) == labels


# Formats that are tables, and several files


def save_arrow(path: Path, table: pa.Table, kind) -> str:
    with kind(str(path), table.schema) as writer:
        writer.write_table(table)
    return str(path)


def test_tables_and_text(tmp_path):
    table = pa.Table.from_pylist(GOOD)
    datasets.Dataset.from_list(GOOD).save_to_disk(tmp_path / "saved", num_shards=2)
    splits = {"train": datasets.Dataset.from_list(GOOD), "test": datasets.Dataset.from_list([])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    for path in (
        save_arrow(tmp_path / "stream.arrow", table, pa.ipc.new_stream),
        save_arrow(tmp_path / "file.arrow", table, pa.ipc.new_file),
        str(tmp_path / "saved"),
        str(tmp_path / "splits"),
    ):
        assert list(load_rows(path, task())) == GOOD, path
    lines = load_rows(
        write(tmp_path, "d.txt", "\nfirst line\n\nsecond\u2028line\r\n"),
        task(input="{text}", target="{text}"),
    )
    assert [row["text"] for row in lines] == ["first line", "second\u2028line"]
    assert lines.where(1) == f"{tmp_path}/d.txt:4"


def test_mistakes_in_tables(tmp_path):
    datasets.DatasetDict({"test": datasets.Dataset.from_list(GOOD)}).save_to_disk(tmp_path / "x")
    assert "has no split 'train'; it has test" in problem(str(tmp_path / "x"))
    named = DataSource(path=str(tmp_path / "x"), split="test")
    assert list(load_rows([named], task())) == GOOD
    write(tmp_path, "d.arrow", b"not arrow")
    assert "is not a complete arrow file" in problem(str(tmp_path / "d.arrow"))
    path = save_arrow(tmp_path / "e.arrow", pa.Table.from_pylist(GOOD * 9000), pa.ipc.new_stream)
    Path(path).write_bytes(Path(path).read_bytes()[:-150_000])
    assert "write it again" in problem(path)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("dataset_dict.json", "[]", "dataset_dict.json: must be a JSON object, not a list"),
        ("dataset_dict.json", "{}", "dataset_dict.json: 'splits' must list names"),
        ("dataset_dict.json", '{"splits": "train"}', "'splits' must list names"),
        ("dataset_dict.json", "[" * 100_000, "dataset_dict.json: is not valid JSON"),
        ("dataset_dict.json", '{"splits": ["train", "..", 5]}', "'splits' must list names"),
        ("train/state.json", "", "state.json: is not valid JSON"),
        ("train/state.json", "null", "state.json: must be a JSON object, not null"),
        ("train/state.json", '{"_data_files": []}', "'_data_files' must list names"),
        ("train/state.json", '{"_data_files": [{}]}', "'_data_files' must list names"),
        ("train/state.json", '{"_data_files": [{"filename": "../x"}]}', "must list names"),
        ("train/state.json", '{"_data_files": [{"filename": "x.arrow"}]}', "x.arrow: no such file"),
        ("train/state.json", None, "split 'train' has no state.json; save the data set again"),
        ("train/data-00000-of-00001.arrow", None, "no such file"),
        ("train/data-00000-of-00001.arrow", "x", "is not a complete arrow file"),
    ],
)
def test_damaged_saved_folders(tmp_path, file, content, words):
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(GOOD)})
    saved.save_to_disk(tmp_path / "d")
    (tmp_path / "d" / file).unlink()
    if content is not None:
        (tmp_path / "d" / file).write_text(content)
    assert words in problem(str(tmp_path / "d"))


def test_globs_and_lists(tmp_path):
    for name in "bca":
        write(tmp_path, f"{name}.jsonl", [{"text": name, "label": "x"}] * 2)
    rows = load_rows(str(tmp_path / "*.jsonl"), task())
    assert [row["text"] for row in rows] == list("aabbcc")
    assert rows.where(3) == f"{tmp_path}/b.jsonl:2"
    assert rows.path == f"{tmp_path}/*.jsonl (3 files)"
    assert [rows[i]["text"] for i in (-1, 0, 2)] == ["c", "a", "b"]
    assert len(rows.components) == 1
    listed = [DataSource(path=str(tmp_path / name)) for name in ("c.jsonl", "[ab].jsonl")]
    assert [row["text"] for row in load_rows(listed, task())] == list("ccaabb")
    assert "matches no file" in problem(str(tmp_path / "*.csv"))
    write(tmp_path, "b.jsonl", [{"text": "", "label": "x"}])
    write(tmp_path, "c.jsonl", [{"text": "x"}])
    assert len(problems(str(tmp_path / "*.jsonl"))) == 2


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Data sets of a folder stand for those of the hub, which is not asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else: many tries
    folder = tmp_path / "org" / "good" / "data"
    folder.mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(GOOD), folder / "train-00000.parquet")
    parquet.write_table(pa.Table.from_pylist(GOOD[:1]), folder / "validation-00000.parquet")
    return tmp_path


def test_hub_data_sets(hub):
    run = task(train="hf://org/good", validation={"hub": "org/good"})
    splits = load_splits(run)
    assert list(splits["train"]) == GOOD
    assert list(splits["validation"]) == GOOD[:1]
    assert splits["train"].where(1) == "hf://org/good[train]: row 2"
    again = load_splits(task(train={"hub": "org/good", "split": "train[1:]"}, validation_share=0))
    assert list(again["train"]) == GOOD[1:]
    with pytest.raises(BadInput, match=r"tasks\.animals\.train: hf://org/none: cannot be loaded"):
        load_splits(task(train="hf://org/none"))


def test_hub_data_sets_are_tables_only(hub):
    (hub / "org" / "pictures").mkdir()
    write(hub, "org/pictures/a.png", b"\x89PNG")
    with pytest.raises(BadInput, match="is read by the 'imagefolder' builder; only tables are"):
        load_splits(task(train="hf://org/pictures"))


# Reading in columns and row by row


def test_arrow_and_python_readers_agree(tmp_path, monkeypatch):
    """Texts at the borders of blocks, blank and spaced lines, escapes: the same rows and places."""
    monkeypatch.setattr(arrow_reader, "_BLOCK_BYTES", 300)
    strings = ["é" * 40, 'a"b', "tab\t", "\u2028", "x" * 700, "NaN, [NaN", "null", "1"]
    lines = [json.dumps({"label": str(i % 3), "n": i, "text": strings[i % 8]}) for i in range(90)]
    for i in (7, 30, 31):
        lines[i] = "" if i == 7 else f"  {lines[i]} \r"
    path = write(tmp_path, "d.jsonl", "\ufeff" + "\n".join(lines))
    run = task(input="{n} {text}")
    fast = load_rows(path, run)
    monkeypatch.setattr("trainer.data.ingest.read_columns", _odd)
    slow = load_rows(path, run)
    assert list(fast) == list(slow)
    assert [fast.where(i) for i in range(89)] == [slow.where(i) for i in range(89)]
    assert fast.hashes().tolist() == slow.hashes().tolist()
    assert len(fast) == 89


def _odd(origin, run):
    raise arrow_reader.NeedsRowwiseCheck


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a", "label": "b"}{"text": "a", "label": "b"}',
        '{"text": "a", "label": "b", "other": NaN}',
        '{"text": "a", "label": "b", "text": 5}',
        '{"text": "a", "label": "b", "label": "b"}',
        '{"text": "a", "label": 1e999}',
        '{"text": "a", "label": 5}',
        '{"text": "a", "label": null}',
        '{"text": "a"}',
        '{"text": "a", "label": "b"} 5',
        '{"text": " ", "label": "b"}',
        '{"text": "a", "label": "b", "other": "\\ud83d"}',
        '{"text": "a",\n"label": "b"}',
    ],
)
def test_column_checks_find_every_mistake(tmp_path, line):
    good = [json.dumps(GOOD[0])] * 50
    messages = problems(write(tmp_path, "d.jsonl", "\n".join([*good, line, *good])))
    assert messages[0].startswith("d.jsonl:51: ")
