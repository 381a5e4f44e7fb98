"""Rows of dialogues under the chat templates of model families: ids and labels of generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.stock_templates import SPECIALS, STOCK, Stock
from tests.tokenizers_of_families import make_tokenizer
from trainer.config import Task
from trainer.data.splits import load_rows
from trainer.data.token_table import Example
from trainer.data.tokenization.tokenize import tokenize

TEXTS = ["Hi Hello. And? Fine, so 3 it is\n\nBe brief. system user assistant Today add json"] * 20
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Fine, so 3"},
    {"role": "user", "content": "Hi Hi"},
    {"role": "assistant", "content": "it is"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "callcall0", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    ],
}
CALLS = [
    TURNS[0],
    CALL,
    {"role": "tool", "name": "add", "tool_call_id": "callcall0", "content": "3"},
    *TURNS[1:4],
]
DIALOGUES = {
    "one turn": TURNS[:2],
    "one turn, system": [SYSTEM, *TURNS[:2]],
    "three turns": TURNS,
    "three turns, system": [SYSTEM, *TURNS],
    "tools": CALLS,
    "tools, system": [SYSTEM, *CALLS],
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    kinds = {stock.kind for stock in STOCK.values()}
    return {kind: make_tokenizer(kind, TEXTS, specials=SPECIALS) for kind in kinds}


def rows_of(folder: Path, tokenizer: Any, stock: Stock, row: dict) -> list[Example]:
    task = Task(
        name="t",
        train="x.jsonl",
        messages="messages",
        chat_template_kwargs=dict(stock.variables),
    )
    path = folder / "d.jsonl"
    path.write_text(json.dumps(row) + "\n")
    ends = tokenizer.convert_tokens_to_ids(list(stock.ends))
    tokenized = tokenize(load_rows(str(path), task), task, tokenizer, 1000, end_ids=ends)
    return list(tokenized.examples)


def of_transformers(tokenizer: Any, stock: Stock, messages: list, **how: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, **how, **stock.variables)["input_ids"]


def continuation(tokenizer: Any, opening: list[int], text: str) -> list[int]:
    """The tokens of a text that generation writes after a prompt that ends a word or a line."""
    before = tokenizer("a<|end|>", add_special_tokens=False)["input_ids"]
    joined = tokenizer("a<|end|>" + text, add_special_tokens=False)["input_ids"]
    assert joined[: len(before)] == before
    return joined[len(before) :]


@pytest.mark.parametrize(
    ("family", "dialogue"),
    [
        (family, dialogue)
        for family, stock in STOCK.items()
        for dialogue in DIALOGUES
        if stock.call is not None or not dialogue.startswith("tools")
    ],
)
def test_every_learned_turn_is_read_and_written_as_in_generation(
    tmp_path, tokenizers, family, dialogue
):
    stock, messages = STOCK[family], DIALOGUES[dialogue]
    tokenizer = tokenizers[stock.kind]
    tokenizer.chat_template = stock.source
    tools = TOOLS if dialogue.startswith("tools") and "if tools" in stock.source else None
    (row,) = rows_of(tmp_path, tokenizer, stock, {"messages": messages, "tools": tools})

    texts, labels = row.linear(), set()
    for number, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        opening = of_transformers(
            tokenizer, stock, messages[:number], tools=tools, add_generation_prompt=True
        )
        written = stock.call if turn is CALL else stock.answer.replace("{}", turn["content"])
        target = continuation(tokenizer, opening, written)
        (text,) = [t for t in texts if t.input_ids[: len(opening + target)] == (*opening, *target)][
            :1
        ]
        span = (len(opening), len(opening) + len(target))
        assert span in text.label_spans, (text.label_spans, span)
        labels.add((texts.index(text), span))
    assert labels == {(i, span) for i, text in enumerate(texts) for span in text.label_spans}
    assert (len(texts) > 1) == (stock.rewrites and dialogue.startswith("three")) or (
        dialogue not in ("one turn", "three turns")
    )


#: The answer continues a generation prompt that the template writes otherwise in a dialogue (its
#: last line break is one token with the next), or ends with the token that begins the next turn; or
#: the template writes the text of the system in a generation prompt only.
_CONTINUED = ("nemotron", "deepseek-v3.1-thinking", "qwen3.5", "glm", "glm-no-thinking", "gemma4")
_CONTINUED += ("mistral-v3",)


@pytest.mark.parametrize("family", STOCK)
def test_ids_are_those_of_transformers(tmp_path, tokenizers, family):
    stock = STOCK[family]
    tokenizer = tokenizers[stock.kind]
    tokenizer.chat_template = stock.source
    (row,) = rows_of(tmp_path, tokenizer, stock, {"messages": [SYSTEM, *TURNS]})
    *_, last = row.linear()
    theirs = of_transformers(tokenizer, stock, [SYSTEM, *TURNS])
    if family not in _CONTINUED:
        assert list(last.input_ids) == theirs
    _, stop = last.label_spans[-1]
    assert tokenizer.decode(last.input_ids[stop:]) == stock.tail
    assert last.input_ids.count(tokenizer.bos_token_id) == theirs.count(tokenizer.bos_token_id)


#: After gpt-oss: the text of a tool call is reasoning, left out of dialogues that end in an answer.
_ANALYSIS = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' and m.tool_calls %}
        {%- if m.content and messages[-1].role != 'assistant' or messages[-1].tool_calls %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.content + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant to=add<|message|>' + m.tool_calls[0].function.arguments | tojson }}
        {{- '<|call|>' }}
    {%- elif m.role == 'tool' %}{{- '<|start|>add<|message|>' + m.content | tojson + '<|end|>' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
    {%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""


def test_an_answer_follows_the_text_that_generation_reads(tmp_path, tokenizers):
    """The template leaves the reasoning before a tool call out of the complete dialogue."""
    tokenizer = tokenizers["llama3"]
    stock = Stock(_ANALYSIS, ("<|return|>", "<|call|>"), "")
    tokenizer.chat_template = stock.source
    called = CALL | {"content": "Hi Hi"}
    quoted = [TURNS[0], called, {**CALLS[2], "content": 'it\n"is"'}, TURNS[1]]
    for messages in ([TURNS[0], called, *CALLS[2:4]], quoted):
        (row,) = rows_of(tmp_path, tokenizer, stock, {"messages": messages, "tools": None})
        for number in (1, 3):
            opening = of_transformers(
                tokenizer, stock, messages[:number], add_generation_prompt=True
            )
            assert tokenizer.decode(opening).count("analysis") == (number == 3)
            spans = [
                tokenizer.decode(text.input_ids[start:stop])
                for text in row.linear()
                for start, stop in text.label_spans
                if list(text.input_ids[:start]) == opening
            ]
            assert spans == [
                {
                    1: "<|channel|>analysis<|message|>Hi Hi<|end|><|start|>assistant to=add"
                    '<|message|>{"a": 1}<|call|>',
                    3: f"<|channel|>final<|message|>{messages[3]['content']}<|return|>",
                }[number]
            ]


@pytest.mark.parametrize(
    ("form", "source"),
    [
        ("object", "{% for k, v in call.arguments.items() %}{{ k ~ '=' ~ v }}{% endfor %}"),
        ("object", "{{ call.arguments | tojson }}"),
        ("object", "{% if call.arguments is mapping %}{{ call.arguments | tojson }}{% endif %}"),
        ("text", "{{ '```json' + call.arguments + '```' }}"),
        ("text", "{{ call.arguments }}"),
    ],
)
@pytest.mark.parametrize("marked", [False, True])
def test_arguments_of_tool_calls_have_the_form_that_the_template_reads(
    tmp_path, tokenizers, form, source, marked
):
    """Some templates read JSON text, others objects: they write text as JSON text again."""
    tokenizer = tokenizers["llama3"]
    begin, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    stock = Stock(
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.tool_calls %}"
        f"{{% set call = m.tool_calls[0].function %}}{begin}{{{{ call.name }}}}{source}{end}"
        "{% else %}{{ m.content }}"
        "{% endif %}{{ '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        ("</s>",),
        "",
    )
    tokenizer.chat_template = stock.source
    read: dict[str, Any] = {"object": {"a": 1}, "text": '{"a": 1}'}
    turns = {
        name: CALL | {"tool_calls": [{"function": {"name": "add", "arguments": arguments}}]}
        for name, arguments in read.items()
    }
    theirs = of_transformers(tokenizer, stock, [TURNS[0], turns[form], CALLS[2], TURNS[1]])
    for turn in turns.values():
        row = {"messages": [TURNS[0], turn, CALLS[2], TURNS[1]], "tools": None}
        (example,) = rows_of(tmp_path, tokenizer, stock, row)
        assert list(example.input_ids) == theirs
