"""``validate --preview``: rows as the base will read them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import commands
from tests.stock_templates import SPECIALS, STOCK
from tests.tokenizers_of_families import make_tokenizer
from trainer.commands import preview as preview_command
from trainer.commands.check_rows import main
from trainer.commands.preview import show, token_text
from trainer.config import RunConfig
from trainer.data.preview import preview
from trainer.runtime.errors import BadInput

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Fine"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = ["Hi Hello And? Fine\n\nIs it good? yes no system user assistant"] * 20
    made = make_tokenizer("llama3", texts, specials=SPECIALS)
    made.chat_template = STOCK["qwen3"].source
    return made


def make_config(folder: Path, rows: list[dict], **task: Any) -> RunConfig:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig(
        output_dir=str(folder / "run"),
        base={"model": "x"},
        tasks=[{"name": "t", "train": str(path), **task}],
        prompts=[{"name": "p", "task": "t", "num_virtual_tokens": 4, "position": "front"}],
        training={"steps": 1},
    )


def shown(texts: Any, tokenizer: Any) -> str:
    out = io.StringIO()
    show(texts, tokenizer, out)
    return out.getvalue()


def test_rows_of_input_and_target(tmp_path, tokenizer):
    rows = [{"text": f"Is it good {i}?", "label": "yes"} for i in range(40)]
    config = make_config(tmp_path, rows, input="{text}", target=" {label}", validation_share=0.5)
    texts = preview(config, tokenizer, 64, len(tokenizer), 9).texts
    assert [text.row for text in texts] == list(range(9))
    assert {text.split for text in texts} == {"train", "validation"}
    ids = tokenizer("Is it good 0? yes")["input_ids"] + [tokenizer.eos_token_id]
    record = texts[0].to_json()
    assert record["input_ids"] == ids
    assert record["labels"] == [-100] * (len(ids) - 2) + ids[-2:]
    assert (record["task"], record["row"], record["virtual_tokens_at"]) == ("t", 1, 0)
    assert "[virtual tokens]<s>|I" in shown(texts, tokenizer)
    assert ">> yes|</s><<" in shown(texts, tokenizer)


def test_virtual_tokens_inside_the_input(tmp_path, tokenizer):
    config = make_config(
        tmp_path,
        [{"text": "Hi", "label": "yes"}] * 12,
        input="Is it good?{virtual_tokens}\n{text}",
        target=" {label}",
        validation_share=0,
    )
    (text,) = preview(config, tokenizer, 64, len(tokenizer), 1).texts
    before = tokenizer("Is it good?")["input_ids"]
    assert text.to_json()["virtual_tokens_at"] == len(before)
    assert "?[virtual tokens]\\n" in shown([text], tokenizer)


def test_a_dialogue_has_one_text_for_each_turn_that_is_rewritten(tmp_path, tokenizer):
    config = make_config(
        tmp_path, [{"messages": TURNS}] * 3, messages="messages", validation_share=0
    )
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    texts = preview(config, tokenizer, 200, len(tokenizer), 2, end_ids=ends).texts
    assert [text.row for text in texts] == [0, 0, 1, 1]
    for text, turns in zip(texts, (TURNS[:2], TURNS, TURNS[:2], TURNS), strict=True):
        record = text.to_json()
        assert record["input_ids"] == tokenizer.apply_chat_template(turns)["input_ids"]
        asked = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]
        assert record["labels"][: len(asked)] == [-100] * len(asked)
        assert record["labels"][len(asked)] != -100
    assert ":1, text 1 of 2: " in shown(texts, tokenizer)


def test_virtual_tokens_inside_a_dialogue(tmp_path, tokenizer):
    config = make_config(
        tmp_path, [{"messages": TURNS[:2]}], messages="messages", validation_share=0
    )
    prompts = [config.prompts[0], config.prompts[0].model_copy(update={"position": "user"})]
    config = config.model_copy(update={"prompts": prompts})
    first, second = preview(config, tokenizer, 200, len(tokenizer), 1).texts
    assert (first.position, first.to_json()["virtual_tokens_at"]) == ("front", 0)
    header = tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    assert (second.position, second.to_json()["virtual_tokens_at"]) == ("user", len(header))
    assert ":1, position user: " in shown([first, second], tokenizer)
    assert "user|\\n[virtual tokens]Hi|" in shown([second], tokenizer)


def test_rows_of_token_ids(tmp_path, tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}]
    config = make_config(tmp_path, rows, tokens={}, validation_share=0)
    (text,) = preview(config, tokenizer, 64, len(tokenizer), 5).texts
    assert text.to_json()["labels"] == [-100, 6, -100]
    with pytest.raises(BadInput, match="has the id 7, but the base embeds 6 tokens"):
        preview(config, tokenizer, 64, 6, 5)


def test_a_long_row_is_shortened_in_the_middle_on_the_terminal_only(tmp_path, tokenizer):
    rows = [{"text": "Hi " * 300, "label": "yes"}]
    config = make_config(tmp_path, rows, input="{text}", target="{label}", validation_share=0)
    (text,) = preview(config, tokenizer, 2000, len(tokenizer), 1).texts
    assert len(text.labels) == text.example.num_tokens > 600
    printed = shown([text], tokenizer)
    hidden = text.example.num_tokens - preview_command.SHOWN_TOKENS
    assert f" ... {hidden:,} tokens, 0 learned ... " in printed
    assert len(re.findall(r"\|", printed)) < preview_command.MAX_TOKENS + 20


def test_the_place_of_the_prompt_is_shown_in_the_middle_of_a_long_row(tmp_path, tokenizer):
    config = make_config(
        tmp_path,
        [{"text": "Hi " * 300, "label": "yes"}],
        input=f"{'Hi ' * 300}good {{virtual_tokens}} {{text}}",
        target="{label}",
        validation_share=0,
    )
    (text,) = preview(config, tokenizer, 4000, len(tokenizer), 1).texts
    before, _, after = shown([text], tokenizer).partition("[virtual tokens]")
    assert before.endswith("good| ")
    assert (before.count(" tokens, 0 learned"), after.count(" tokens, 0 learned")) == (1, 1)


def test_tokens_cannot_control_the_terminal(tokenizer):
    ids = tokenizer("\x1b[2J\n\\é", add_special_tokens=False)["input_ids"]
    printed = "".join(token_text(tokenizer, token) for token in ids)
    assert "\x1b" not in printed
    assert "\n" not in printed
    assert "\\x1b" in printed


def test_the_command(tmp_path, monkeypatch):
    calls: list[Any] = []
    config = make_config(tmp_path, [{"a": 1, "b": 2}], input="{a}", target="{b}")
    monkeypatch.setattr(commands.preflight, "check_run", lambda *_: config)
    monkeypatch.setattr(
        commands, "run_alone", lambda module, arguments, **_: calls.append((module, arguments)) or 0
    )
    runner = CliRunner()
    result = runner.invoke(commands.app, ["validate", "r.yaml", "a=1", "--preview", "3"])
    assert result.exit_code == 0
    assert calls == [("trainer.commands.check_rows", ["--rows=3", "--", "r.yaml", "a=1"])]
    result = runner.invoke(commands.app, ["validate", "r.yaml", "--preview", "1", "--json", "-"])
    assert result.exit_code == 0
    assert result.stdout == ""
    result = runner.invoke(commands.app, ["validate", "r.yaml", "--json", "x.json"])
    assert "--json: writes the rows of --preview" in str(result.exception)


def test_problems_are_printed_and_end_with_2(tmp_path, capsys):
    assert main(["--rows=1", "--", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
