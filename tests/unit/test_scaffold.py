"""``promptshard init`` and ``promptshard examples``: what they write works at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from launch import column_sample, preflight
from launch.commands import app
from launch.run_templates import KINDS
from trainer.config import load
from trainer.runtime.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_copied_examples_work_inside_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = call("examples", "new/work")
    monkeypatch.chdir("new/work")
    copied = sorted(path.name for path in Path().glob("*.yaml"))
    assert copied == sorted(path.name for path in (ROOT / "examples").glob("*.yaml"))
    for name in copied:
        assert f"  {name}" in shown
        config = preflight.check_run(name, [])
        for task in config.tasks:
            for source in [*task.train, *(task.validation or [])]:
                assert source.path is not None
                assert Path(source.path).is_file()
        assert Path(config.base.model, "config.json").is_file()
    assert [*Path().rglob("*.py")] == [Path("pharmacy/rows.py")], "a step of its document"
    assert not [*Path().rglob("__pycache__")]


def test_examples_needs_a_new_or_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    call("examples", str(tmp_path / "empty"))
    with pytest.raises(BadInput, match="empty: is not empty; name a new or empty folder"):
        call("examples", str(tmp_path / "empty"))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(BadInput, match="file: is a file"):
        call("examples", str(file))
    with pytest.raises(BadInput, match="file/below: is a file"):
        call("examples", str(file / "below"))


def settings_in_comments(text: str) -> list[tuple[int, str]]:
    """Optional settings of a run file: number of the line, and the line without its ``#``."""
    lines = enumerate(text.splitlines())
    return [(i, line.replace("#", "", 1)) for i, line in lines if re.match(r" *#[a-z_]+:", line)]


@pytest.mark.parametrize("kind", KINDS)
def test_init_writes_a_file_that_validates_and_explains_every_setting(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"promptshard train {kind}.yaml" in call("init", kind)
    file = tmp_path / f"{kind}.yaml"
    preflight.check_run(file.name, [])
    text = file.read_text()
    assert max(map(len, text.splitlines())) <= 100
    optional = settings_in_comments(text)
    assert len(optional) >= 15
    default = load(file).model_dump()
    for number, line in optional:
        lines = text.splitlines()
        lines[number] = line
        file.write_text("\n".join(lines))
        changed = load(file).model_dump()
        assert (changed == default) != ("# e.g." in line), line


def test_init_fills_in_its_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model", "config.json").write_text("{}")
    Path("cost$.csv").write_text("id,review,stars\n" + "1,good,5\n2,bad,1\n3,fine,5\n" * 5)
    call(
        *("init", "classify", "sub/mine.yaml", "--train", "cost$.csv", "--validation", "cost$.csv"),
        *("--model", "model", "--output-dir", "out: 1"),
    )
    config = preflight.check_run("sub/mine.yaml", [])
    (task,) = config.tasks
    assert (task.input, task.target) == ("{review}\nAnswer:", " {stars}")
    assert task.choices == ["1", "5"]
    assert [source.path for source in [*task.train, *(task.validation or [])]] == ["cost$.csv"] * 2
    assert (config.base.model, config.output_dir) == ("model", "out: 1")


ROWS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "labels in lists": (
        "classify",
        [{"title": "a", "body": "b", "tags": tags} for tags in (["x"], ["x", "y"], ["no"])],
        {"input": "{title}\n{body}\nAnswer:", "choices": ["x", "y", "no"], "multi_label": True},
    ),
    "numbers and flags": (
        "sweep",
        [{"text": str(i), "spam": i % 2 == 0} for i in range(9)],
        {"target": " {spam}", "choices": ["true", "false"]},
    ),
    "names before order": (
        "classify",
        [{"label": "no" if i % 2 else "yes", "text": "ab"[i % 2]} for i in range(8)],
        {"input": "{text}\nAnswer:", "choices": ["yes", "no"]},
    ),
    "many labels with a usual name": (
        "classify",
        [{"text": f"text {i}", "intent": f"intent {i}"} for i in range(150)],
        {"target": " {intent}", "choices": [f"intent {i}" for i in range(150)]},
    ),
    "numbers ascending": (
        "classify",
        [{"text": f"text {i}", "rating": f"{3 - i % 3}.0"} for i in range(9)],
        {"target": " {rating}", "choices": ["1", "2", "3"]},
    ),
    "other labels are no inputs": (
        "classify",
        [
            {
                "comment": f"This is the comment number {i}.",
                "toxic": i % 2,
                "n": str(i),
                "obscene": i % 3,
            }
            for i in range(9)
        ],
        {"input": "{comment}\nAnswer:", "target": " {obscene}", "choices": ["0", "1", "2"]},
    ),
    "identifiers are no inputs": (
        "classify",
        [
            {"Order ID": f"A {i}", "userId": f"B {i}", "note": f"n {i}", "PAID": "yn"[i % 2]}
            for i in range(9)
        ],
        {"input": "{note}\nAnswer:", "target": " {PAID}"},
    ),
    "vectors are no labels": (
        "classify",
        [{"text": f"t{i}", "kind": "ab"[i % 2], "vector": [1.0, 2.0]} for i in range(9)],
        {"target": " {kind}", "choices": ["a", "b"], "multi_label": False},
    ),
    "instruction and input": (
        "generate",
        [{"instruction": "Add.", "input": f"{i}+1", "output": f"{i + 1}"} for i in range(3)],
        {"input": "{instruction}\n{input}\nAnswer:", "target": " {output}"},
    ),
    "inputs that some rows lack": (
        "generate",
        [
            {"instruction": "Add 1 to 2.", "output": "3"},
            {"instruction": "Add.", "input": "1+2", "output": "3"},
            {"instruction": "Add 2 to 2.", "input": "", "output": "4"},
            {"instruction": "Add 2 to 3.", "input": None, "output": "5"},
        ],
        {"input": "{instruction}\n{input}\nAnswer:", "optional": ["input"]},
    ),
    "a prompt and its continuation": (
        "generate",
        [{"prompt": f"Color of {i}?\n\n###\n\n", "completion": f" blue {i}"} for i in range(3)],
        {"input": "{prompt}", "target": "{completion}", "metric": "exact_match"},
    ),
    "labels that continue a prompt": (
        "classify",
        [{"prompt": f"{i} is", "completion": [" odd", " even"][i % 2]} for i in range(9)],
        {"input": "{prompt}", "target": "{completion}", "choices": [" odd", " even"]},
    ),
    "a column with input and target": (
        "generate",
        [
            {
                "instruction": "Add.",
                "input": f"{i}+1",
                "output": f"{i}.",
                "text": f"Add. {i}+1: {i}.",
            }
            for i in range(3)
        ],
        {"input": "{instruction}\n{input}\nAnswer:"},
    ),
    "a context with the answer": (
        "generate",
        [{"context": f"I am {i}.", "question": "Who?", "answer": str(i)} for i in range(3)],
        {"input": "{context}\n{question}\nAnswer:"},
    ),
    "names of labels": (
        "classify",
        [{"text": f"t {i}", "label": i % 2, "label_text": ["no", "yes"][i % 2]} for i in range(9)],
        {"target": " {label_text}", "choices": ["no", "yes"]},
    ),
    "the source of a problem": (
        "generate",
        [{"source": "book", "problem": f"{i}?", "solution": f"{i}!"} for i in range(9)],
        {"input": "{problem}\nAnswer:", "target": " {solution}"},
    ),
    "a title that some rows lack": (
        "classify",
        [
            {
                "title": f"t {i}" if i % 3 else None,
                "remark": f"It is the text number {i}.",
                "stars": i % 2,
            }
            for i in range(9)
        ],
        {"input": "{title}\n{remark}\nAnswer:", "optional": ["title"], "target": " {stars}"},
    ),
    "long answers": (
        "generate",
        [
            {"question": f"{i}?", "answer": f"The answer to question {i} is {i + 1}, I believe."}
            for i in range(3)
        ],
        {"input": "{question}\nAnswer:", "target": " {answer}", "metric": "loss"},
    ),
    "unknown names": (
        "generate",
        [{"uuid": f"x{i}", "english": f"one {i}", "french": f"un {i}"} for i in range(3)],
        {"input": "{english}\nAnswer:", "target": " {french}"},
    ),
    "dialogues": (
        "chat",
        [{"n": 1, "talk": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
        {"messages": "talk"},
    ),
    "only texts": ("distill", [{"notes": "a"}, {"notes": "b"}], {"input": "{notes}\nAnswer:"}),
}


@pytest.mark.parametrize(("kind", "rows", "expected"), ROWS.values(), ids=ROWS)
def test_init_reads_columns(kind, rows, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    call("init", kind, "--train", "rows.jsonl", "--validation", "rows.jsonl")
    config = preflight.check_run(f"{kind}.yaml", [])
    values = config.tasks[0].model_dump()
    assert {key: values[key] for key in expected} == expected


def test_init_names_other_columns_of_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{i} words,{i % 2},{i % 3},{i}\n" for i in range(20))
    Path("rows.csv").write_text("comment,toxic,obscene,n\n" + rows)
    call("init", "classify", "--train", "rows.csv")
    text = Path("classify.yaml").read_text()
    assert "target: ' {obscene}' # or toxic\n" in text
    assert "# Words are often easier for a model than numbers" in text


def test_init_says_how_many_rows_lack_an_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Add {i}.", "input": "1" * (i % 4), "output": "2"} for i in range(40)]
    Path("rows.json").write_text(json.dumps(rows))
    call("init", "generate", "--train", "rows.json")
    text = Path("generate.yaml").read_text()
    assert "their line in input is then empty: input in 10 of 40 rows.\n" in text
    Path("rows.jsonl").write_text('{"text": "a", "code": "b"}\n{"code": "c"}\n')
    call("init", "generate", "--train", "rows.jsonl", "--force")
    assert "optional" not in Path("generate.yaml").read_text().replace("Optional settings", "")


def test_init_leaves_out_columns_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = {"bytes": b"x", "path": None}
    rows = [{"text": f"text {i}", "image": image, "label": "ab"[i % 2]} for i in range(12)]
    parquet.write_table(pa.Table.from_pylist(rows), "rows.parquet")
    call("init", "classify", "--train", "rows.parquet")
    task = preflight.check_run("classify.yaml", ["tasks[0].validation_share=0.5"]).tasks[0]
    assert (task.input, task.choices) == ("{text}\nAnswer:", ["a", "b"])


def test_init_leaves_out_blank_labels_and_names_similar_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("text,label\n" + "a,Pos\nb,neg\nc,pos \n,\n" * 2)
    call("init", "classify", "--train", "rows.csv")
    text = Path("classify.yaml").read_text()
    assert "choices: [Pos, neg, 'pos ']" in text
    assert "# The labels; [Pos, 'pos '] differ only in case or white space." in text
    with pytest.raises(BadInput, match="label: is empty; give it a label or remove the row"):
        preflight.check_run("classify.yaml", [])


HEADERS = {
    "label": ("I loved it,pos\n" + "I hated it,neg\nok,pos\n" * 4, "'pos' is also a label in its"),
    "number": (
        "that was the best one,1.5\nthis was not good at all,2\nit went on and on,1\n",
        "'1.5' is a number like all values",
    ),
    "years": ("text,2019,2020\na b,5,6\nb,7,6\n", "'2019' is a number like all values"),
    "texts": (
        "this is a very good film,a\n"
        + "that was a very bad film,b\nwe liked it a lot too,c\n" * 4,
        "'this is a very good film' is as long as the texts",
    ),
    "survey": (
        "Name,What did you like about the course?,What can we improve in the course?\n"
        + "Ann,It was all very well explained,There could be a few more exercises\n"
        + "Bob,I liked the many exercises best,It went on for too many hours\n",
        "'What did you like about the course?' is as long as the texts",
    ),
    "a word": ("message,spam\n" + "Buy!,spam\nHi,ham\n" * 4, "'spam' is also a label"),
}


@pytest.mark.parametrize(("text", "reason"), HEADERS.values(), ids=HEADERS)
def test_init_notes_a_header_that_looks_like_a_row(text, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text(text)
    shown = call("init", "classify", "--train", "rows.csv")
    assert "note: rows.csv:1: the first line is read as column names, but" in shown
    assert reason in shown
    assert "if it is a row, add a line with column names before it, and write the run file" in shown


@pytest.mark.parametrize(
    "text",
    [
        "text,label\n" + "text,a\nx,b\nsome,a\nmore,b\nothers,b\n",
        "0,1\n5,a\n7,b\n",
        ",0,1\n" + "0,some words,1\n1,other words,2\n" * 5,
        "Which of these products did you buy last year?,label\nbread,a\nmilk,b\n",
        "Review ,Sentiment \n" + "good,a\nbad,b\n" * 5,
    ],
)
def test_init_accepts_headers(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text(text)
    assert "note:" not in call("init", "classify", "--train", "rows.csv")


def test_a_missing_header_is_named_beside_the_missing_column(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call("init", "classify")
    Path("rows.csv").write_text("I loved it,pos\n" + "I hated it,neg\nok,pos\n" * 4)
    with pytest.raises(BadInput) as caught:
        preflight.check_run("classify.yaml", ["tasks[0].train=rows.csv"])
    assert "rows.csv: the first line is read as column names, but 'pos' is also a label in its" in (
        str(caught.value)
    )


def test_init_says_that_labels_are_those_of_the_first_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(column_sample, "MAX_ROWS", 10)
    Path("rows.csv").write_text("text,label\n" + "a,x\nb,y\n" * 6 + "c,z\n")
    call("init", "classify", "--train", "rows.csv")
    text = Path("classify.yaml").read_text()
    assert "# The labels of the first 10 rows; add those of others." in text
    assert "choices: [x, y]" in text.replace("'", "")


def test_init_refuses_bad_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("one\ntwo\n")
    answers = "".join(f"question {i},this is the answer number {i}\n" for i in range(9))
    Path("answers.csv").write_text("question,answer\n" + answers)
    Path("spaces.csv").write_text("text, label\na, x\nb, y\n")
    Path("list.jsonl").write_text('[{"text": "a"},\n{"text": "b"}]\n')
    Path("bad.jsonl").write_text("{\n")
    turns = [{"role": "developer", "content": "a"}, {"role": "assistant", "content": "b"}]
    Path("roles.jsonl").write_text(json.dumps({"messages": turns}))
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "function_call": {"name": "f"}},
    ]
    Path("calls.jsonl").write_text(json.dumps({"messages": turns}))
    Path("nested.json").write_text(json.dumps({"data": [{"title": "a", "paragraphs": [{}]}]}))
    Path("pairs.jsonl").write_text(json.dumps({"translation": {"en": "yes", "fr": "oui"}}))
    Path("folder.yaml").mkdir()
    Path("old.yaml").write_text("mine")
    for arguments, problem in {
        ("clasify",): r"'clasify' is not a kind \(did you mean 'classify'\?\)",
        ("texts.txt",): r"is not a kind; known: .*; .* promptshard init KIND --train texts\.txt",
        ("chat", "texts.txt"): "ends in .yaml; name data with --train, and put a glob in quotes",
        ("chat", "old.yaml"): "old.yaml: exists; name another file, or replace it with --force",
        ("chat", "folder.yaml", "--force"): "folder.yaml: is a folder",
        ("chat", "rows.csv"): "rows.csv: the name of a run file ends in .yaml",
        ("chat", "--train", "$none/a.jsonl"): r"--train: \$none/a\.jsonl: no such file",
        ("chat", "--train", "https://huggingface.co/datasets/org/a"): "is a URL; write hf://org/a$",
        ("chat", "--train", "https://x.org/a.csv"): "is a URL; download the file, and name it",
        ("chat", "--train", "none.jsonl"): r"--train: none\.jsonl: no such file",
        ("chat", "--train", "texts.txt"): r"no column of dialogues \(columns: text\).*distill",
        ("chat", "--train", "answers.csv"): "no column of dialogues .*init generate",
        ("generate", "--train", "nested.json"): "to learn .* write the values in paragraphs in col",
        ("distill", "--train", "pairs.jsonl"): "to read .* write the values in translation in col",
        ("chat", "--train", "roles.jsonl"): r"messages: \[0\]\.role: 'developer' is not one of",
        ("generate", "--train", "texts.txt"): "to learn.*one to read and one to learn, .*distill",
        ("chat", "--train", "calls.jsonl"): r"messages: \[1\] has function_call, an earlier form",
        ("classify", "--train", "texts.txt"): "no column with 2 to 200 different labels",
        ("classify", "--train", "spaces.csv"): "name of column ' label' begins with a sp",
        ("classify", "--train", "list.jsonl"): r"list.jsonl:1: .*\(a list: name it \.json\)",
        ("classify", "--train", "answers.csv"): "no column with 2 to 200 .*init generate",
        ("chat", "--train", "bad.jsonl"): "--train: bad.jsonl:1: not valid JSON",
        ("chat", "--model", "./none"): r"base\.model: \./none: no such folder",
        ("chat", "--validation", "none.csv"): "validation: none.csv: no such file",
    }.items():
        with pytest.raises(BadInput, match=problem):
            call("init", *arguments)
    assert sorted(path.name for path in tmp_path.glob("*.yaml")) == ["folder.yaml", "old.yaml"]
    assert Path("old.yaml").read_text() == "mine"
    call("init", "chat", "old.yaml", "--force")
    preflight.check_run("old.yaml", [])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("answer", ["completion", "chosen"])
def test_init_says_how_to_join_divided_dialogues(answer, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}?"}],
            answer: [{"role": "assistant", "content": "Yes."}],
        }
        for i in range(20)
    ]
    if name == "rows.parquet":
        parquet.write_table(pa.Table.from_pylist(rows), name)
    else:
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadInput) as caught:
        call("init", "chat", "--train", name)
    message, _, code = str(caught.value).partition(" in one column: ")
    assert message.endswith(f"; join the turns in prompt and {answer}")
    exec(code, {"datasets": datasets})
    call("init", "chat", "--train", "NEW.jsonl")
    task = preflight.check_run("chat.yaml", []).tasks[0]
    assert task.messages == "messages"


def test_init_says_that_rejected_answers_are_not_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(3)]
    Path("rows.json").write_text(json.dumps(rows))
    assert "note: the answers in the column chosen are learned" in (
        call("init", "generate", "--train", "rows.json")
    )


def test_init_names_columns_that_are_not_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "text": f"t {i}",
            "context_text": f"u {i}",
            "system": "Be brief.",
            "options": ["x", str(i)],
            "url": "x",
            "n": i,
            "few": "ab"[i % 2],
            "empty": "",
            "answer": f"a {i}",
        }
        for i in range(20)
    ]
    Path("rows.json").write_text(json.dumps(rows))
    shown = call("init", "generate", "--train", "rows.json")
    assert "note: columns that the run file does not use: context_text, system, options\n" in shown
    Path("rows.csv").write_text("text,label\na,x\nb,y\n")
    assert "note" not in call("init", "classify", "--train", "rows.csv")


def test_init_says_what_is_read_of_a_text_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("code.txt").write_text("def f(x):\n    return x\n")
    shown = call("init", "distill", "--train", "code.txt")
    assert "note: code.txt: each line is a row\n" in shown
    assert "note: write the prompt to compress in prompts[0].teacher of the file\n" in shown
    assert "note" not in call("init", "distill", "--force")


def test_init_without_a_kind_lists_them():
    result = CliRunner().invoke(app, ["init"])
    assert result.exit_code == 2
    assert all(re.search(rf"^  {kind} +\w", result.output, re.MULTILINE) for kind in KINDS)
