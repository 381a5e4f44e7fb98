"""``base.chat_template`` and ``tasks.chat_template_kwargs``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tokenizers_of_families import make_tokenizer
from trainer.config import Base, Task
from trainer.data.splits import load_rows
from trainer.data.tokenization.tokenize import encode_request, tokenize
from trainer.model.chat_template_file import read_chat_template
from trainer.model.checkpoint_files import open_base, portable
from trainer.runtime.cache_dir import cache_dir
from trainer.runtime.errors import BadInput

SOURCE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' + ('think' if thinks else '') }}{% endif %}"
)
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def tokenizer() -> Any:
    made = make_tokenizer("gpt2", ["Hi Hello think user assistant"] * 9)
    made.chat_template = SOURCE
    return made


def make_task(**variables: Any) -> Task:
    return Task(name="t", train="x.jsonl", messages="messages", chat_template_kwargs=variables)


def rows_of(folder: Path, task: Task) -> Any:
    path = folder / "d.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n")
    return load_rows(str(path), task)


def test_variables_reach_the_dialogue_and_its_generation_prompt(tmp_path, tokenizer):
    for thinks in (False, True):
        task = make_task(thinks=thinks)
        asked = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True, thinks=thinks)
        ids, _ = encode_request(tokenizer, task, "Hi")
        assert ids == asked["input_ids"]
        if not thinks:
            (example,) = tokenize(rows_of(tmp_path, task), task, tokenizer, 99).examples
            assert list(example.input_ids[: example.target_start]) == ids
    with pytest.raises(BadInput, match="continues with 'think' where the dialogue has other text"):
        tokenize(rows_of(tmp_path, task), task, tokenizer, 99)


def test_variables_that_cannot_work_are_refused(tmp_path, tokenizer):
    task = make_task(thniks=True, thinks=False)
    with pytest.raises(BadInput) as caught:
        tokenize(rows_of(tmp_path, task), task, tokenizer, 99)
    assert caught.value.problems == [
        "tasks.t.chat_template_kwargs.thniks: the chat template reads no such variable (did you "
        "mean 'thinks'?); correct the name or remove it"
    ]
    with pytest.raises(ValueError, match=r"chat_template_kwargs\.tokenize: is set by this program"):
        make_task(tokenize=False)
    with pytest.raises(ValueError, match="chat_template_kwargs: works with messages or chat only"):
        Task(name="t", train="x", input="{a}", target="{b}", chat_template_kwargs={"a": 1})


def test_the_cache_key_includes_the_variables(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("PROMPTSHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("trainer.data.tokenization.tokenize.MANY_ROWS", 1)
    monkeypatch.setattr("trainer.data.tokenization.worker_pool.num_cores", lambda: 1)
    for number, variables in enumerate(({}, {"thinks": False}, {"thinks": ""})):
        for ends in ((), (2,)):
            for _ in range(2):
                task = make_task(**variables)
                tokenize(rows_of(tmp_path, task), task, tokenizer, 99, end_ids=ends)
        tables = [path for path in cache_dir("tokens").iterdir() if path.is_dir()]
        assert len(tables) == 2 * (number + 1)


def test_a_file_replaces_the_template(tmp_path, family, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("chat.jinja").write_text("{%- generation %}{{ 'own' }}{% endgeneration %}")
    settings = Base(model=str(family("llama")), chat_template="chat.jinja")
    files = open_base(settings)
    assert files.tokenizer.chat_template == Path("chat.jinja").read_text()
    assert portable(settings).chat_template == str(tmp_path / "chat.jinja")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file; name a Jinja file"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b" \n", "is empty"),
        (b"a\nb{% if %}", r"t\.jinja:2: is not valid Jinja: Expected an expression"),
        (b"{% for m in messages %}\n\n{% endif %}", r"t\.jinja:3: is not valid Jinja: .* 'endif'"),
        (b"x" * (2 << 20), "has more than 1,048,576 bytes"),
    ],
)
def test_a_file_that_is_no_template_is_refused(tmp_path, content, expected):
    path = tmp_path / "t.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=rf"^base\.chat_template: .*{expected}"):
        read_chat_template(str(path))


def test_a_file_may_use_what_transformers_templates_use(tmp_path):
    source = (
        "{% for m in messages %}{% generation %}{{ m.content | tojson }}{% endgeneration %}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%Y') }}"
    )
    path = tmp_path / "t.jinja"
    path.write_text(source)
    assert read_chat_template(str(path)) == source


LONG = "Hi Hello " * 40


@pytest.mark.parametrize("position", ["front", "user"])
def test_truncation_of_chat_cuts_the_beginning_of_the_longest_column(tmp_path, tokenizer, position):
    settings = {"chat": True, "input": "user {a}: {b} think", "target": "{c} {a}"}
    task = Task(name="t", train="x.jsonl", too_long="truncate", **settings)
    row = {"a": "Hello", "b": LONG + "end", "c": "Hi"}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"b": "end"}) + "\n")
    rows = load_rows(str(path), task)
    result = tokenize(rows, task, tokenizer, 60, position=position)
    assert result.truncated == 1
    cut, short = result.examples
    text = tokenizer.decode(cut.input_ids)
    own = text.removeprefix("<user>user Hello: ").removesuffix(" think<assistant>Hi Hello")
    assert (LONG + "end").endswith(own)
    assert own.endswith("end")
    assert 58 <= cut.num_tokens <= 60
    asked = tokenizer.decode(cut.input_ids[: cut.target_start])
    assert asked == f"<user>user Hello: {own} think<assistant>"
    assert (cut.prompt_at, cut.input_ids[: cut.prompt_at]) == (
        short.prompt_at,
        short.input_ids[: short.prompt_at],
    )
    complete = tokenize(rows, task, tokenizer, 1000, position=position).examples[0]
    assert cut.input_ids[cut.target_start :] == complete.input_ids[complete.target_start :]


def test_truncation_of_chat_cuts_neither_template_nor_target(tmp_path, tokenizer):
    """The second longest column is cut where the longest one is not enough."""
    settings = {"chat": True, "input": "{a} user {b}", "target": "{c}"}
    task = Task(name="t", train="x.jsonl", too_long="truncate", **settings)
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"a": LONG, "b": LONG + LONG, "c": "Hi"}) + "\n")
    rows = load_rows(str(path), task)
    (example,) = tokenize(rows, task, tokenizer, 60).examples
    first, second = tokenizer.decode(example.input_ids).split(" user ")
    assert LONG.endswith(first.removeprefix("<user>"))
    assert second.removesuffix("<assistant>Hi").strip() in ("", "Hello")
    path.write_text(json.dumps({"a": LONG, "b": "Hi", "c": LONG}) + "\n")
    with pytest.raises(BadInput) as caught:
        tokenize(load_rows(str(path), task), task, tokenizer, 60)
    assert "with one token of each column of the input; 60 fit" in caught.value.problems[0]
    assert "text of templates and the target are never cut" in caught.value.problems[0]
