"""Dialogues as transformers writes them: families, tools, parts, dates, templates without end."""

from __future__ import annotations

import datetime
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers.utils.chat_template_utils as chat_template_utils

from tests.tokenizers_of_families import make_tokenizer
from trainer import run
from trainer.config import Task
from trainer.data.splits import load_rows
from trainer.data.token_table import Example
from trainer.data.tokenization import chat_template
from trainer.data.tokenization.chat import DialogueEncoder
from trainer.data.tokenization.chat_template import CHAT_DATE, keep_chat_date, read_chat_date
from trainer.data.tokenization.cpu_limit import CpuLimitExceeded, cpu_limit
from trainer.data.tokenization.tokenize import Tokenized, encode_request, tokenize
from trainer.runtime.cache_dir import cache_dir
from trainer.runtime.errors import BadInput

DIALOGUES = Task(name="t", train="x.jsonl", messages="messages")
MARKS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|start|>", "<|channel|>"]
MARKS += ["<|message|>", "<|end|>", "<|return|>", "<|user|>", "<|assistant|>", "<tool_call>"]

#: ChatML that writes tools, calls and results, after Qwen 2.5.
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>' + call.function.name + call.function.arguments | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
#: After Phi 3: EOS ends the whole dialogue.
PHI = """\
{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}\
{% endif %}"""
#: After Qwen 3: the last answer has an empty block of thoughts, earlier ones have none.
QWEN_3 = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
#: After gpt-oss: earlier answers end otherwise, and the generation prompt is short.
GPT_OSS = """\
{%- macro day() -%}{{ 'Current date: ' + strftime_now('%Y-%m-%d') }}{%- endmacro -%}
{{- '<|start|>system<|message|>' + day() + '<|end|>' }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
        {{- '<|return|>' if loop.last else '<|end|>' }}
    {%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
#: The same as TRL trains it: whole turns are marked, the beginning that is not generated included.
GPT_OSS_MARKED = GPT_OSS.replace(
    "{{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}\n"
    "        {{- '<|return|>' if loop.last else '<|end|>' }}",
    "{% generation %}{{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}"
    "{{- '<|return|>' }}{% endgeneration %}",
)
#: After DeepSeek V3.1 and Nemotron 3: generation begins inside of the thoughts.
THINKS = QWEN_3.replace("<think>\\n\\n</think>\\n\\n", "<think></think>").replace(
    "assistant\\n' }}{%- endif %}", "assistant\\n<think>\\n' }}{%- endif %}"
)
#: After Qwen 3.5: generation begins inside of thoughts that an answer without any has empty.
QWEN_3_5 = QWEN_3.replace(" and loop.last", "").replace(
    "assistant\\n' }}{%- endif %}", "assistant\\n<think>\\n' }}{%- endif %}"
)
#: The same with whole turns marked.
QWEN_3_5_MARKED = QWEN_3_5.replace(
    "{%- for message in messages %}",
    "{%- for message in messages %}{%- if message.role == 'assistant' %}{% generation %}"
    "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}"
    "{{- message.content + '<|im_end|>\\n' }}"
    "{% endgeneration %}{%- continue %}{%- endif %}",
)
#: After vision models: content is read as parts only.
PARTS = """\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% for part in \
message.content %}{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}\
{{ '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}" + CHATML

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TWO = [USER, ANSWER, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Fine"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]
CALL = {
    "role": "assistant",
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    ],
}
CALLS = [USER, CALL, {"role": "tool", "content": "3"}, ANSWER]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = ["Hi Hello And? Fine\n\nToday: system user assistant final tool add adds name"] * 20
    return make_tokenizer("llama3", texts, specials=MARKS)


def with_template(tokenizer: Any, source: str) -> Any:
    tokenizer.chat_template = source
    return tokenizer


def make_task(**settings: Any) -> Task:
    return Task(name="t", **{"train": "x.jsonl", "messages": "messages", **settings})


def tokenized(folder: Path, tokenizer: Any, rows: list[dict], **settings: Any) -> Tokenized:
    path, task = folder / "d.jsonl", make_task(**settings)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tokenize(load_rows(str(path), task), task, tokenizer, 400)


def of_transformers(tokenizer: Any, messages: list, **how: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, **how)["input_ids"]


def learned(tokenizer: Any, example: Example) -> list[str]:
    return [tokenizer.decode(example.input_ids[a:b]) for a, b in example.label_spans]


@pytest.mark.parametrize(
    ("source", "messages", "expected"),
    [
        (CHATML, TWO, ["Hello<|im_end|>\n", "Fine<|im_end|>\n"]),
        (PHI, TWO[:2], ["Hello<|end|>\n</s>"]),
        (QWEN_3, TWO[:2], ["<think>\n\n</think>\n\nHello<|im_end|>\n"]),
        (GPT_OSS, TWO[:2], ["<|channel|>final<|message|>Hello<|return|>"]),
        (GPT_OSS_MARKED, TWO[:2], ["<|channel|>final<|message|>Hello<|return|>"]),
        (
            GPT_OSS_MARKED,
            TWO,
            [f"<|channel|>final<|message|>{w}<|return|>" for w in ("Hello", "Fine")],
        ),
    ],
)
def test_labels_begin_where_the_generation_prompt_ends(
    tmp_path, tokenizer, source, messages, expected
):
    with_template(tokenizer, source)
    (example,) = tokenized(tmp_path, tokenizer, [{"messages": messages}]).examples
    assert list(example.input_ids) == of_transformers(tokenizer, messages)
    assert learned(tokenizer, example) == expected
    turns = [n for n, turn in enumerate(messages) if turn["role"] == "assistant"]
    for n, (start, _) in zip(turns, example.label_spans, strict=True):
        asked = of_transformers(tokenizer, messages[:n], add_generation_prompt=True)
        assert list(example.input_ids[:start]) == asked
    assert encode_request(tokenizer, DIALOGUES, "Hi")[0] == of_transformers(
        tokenizer, [USER], add_generation_prompt=True
    )


def test_a_multi_token_character_at_the_end_of_the_marker_is_complete(tmp_path, tokenizer):
    """transformers leaves all but the first of these tokens out of its mask."""
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    with_template(tokenizer, source)
    messages = [USER, {"role": "assistant", "content": "Fine 🙂"}]
    (example,) = tokenized(tmp_path, tokenizer, [{"messages": messages}]).examples
    assert len(tokenizer("🙂", add_special_tokens=False)["input_ids"]) > 1
    assert learned(tokenizer, example) == ["Fine 🙂"]


@pytest.mark.parametrize("source", [PHI, QWEN_3, GPT_OSS])
def test_a_row_whose_turns_are_rewritten_equals_one_row_per_turn(tmp_path, tokenizer, source):
    with_template(tokenizer, source)
    rows = [TWO, TWO[:2], [USER, ANSWER | {"weight": 0}, *TWO[2:]]]
    tokens = tokenized(tmp_path, tokenizer, [{"messages": row} for row in rows])
    tree, *alone = tokens.examples
    assert [(t.input_ids, t.label_spans) for t in tree.linear()] == [
        (example.input_ids, example.label_spans) for example in alone
    ]
    for example, messages in zip(alone, (TWO[:2], TWO), strict=True):
        ((start, stop),) = example.label_spans
        assert list(example.input_ids) == of_transformers(tokenizer, messages)
        assert list(example.input_ids[:start]) == of_transformers(
            tokenizer, messages[:-1], add_generation_prompt=True
        )
        assert stop == example.num_tokens
    assert tokens.rewritten == 1


def test_a_generation_prompt_that_no_answer_follows_is_refused(tmp_path, tokenizer):
    """Rows with different answers have one and the same problem."""
    with_template(tokenizer, THINKS.replace("<think></think>", ""))
    with pytest.raises(BadInput) as caught:
        tokenized(tmp_path, tokenizer, [{"messages": TWO[:2]}, {"messages": TWO[2:]}])
    (problem,) = caught.value.problems
    assert problem.startswith(
        f"{tmp_path}/d.jsonl:1 and 1 more row: messages: [1]: the generation prompt of the chat "
        "template opens <think>, and neither the row nor the template closes it before the answer; "
    )


def test_an_answer_closes_the_thoughts_that_its_generation_prompt_opens(tmp_path, tokenizer):
    """The template writes answers without thoughts in another way than generation does."""
    with_template(tokenizer, THINKS)
    (example,) = tokenized(tmp_path, tokenizer, [{"messages": TWO[:2]}]).examples
    asked = of_transformers(tokenizer, [USER], add_generation_prompt=True)
    assert list(example.input_ids[: example.target_start]) == asked
    assert learned(tokenizer, example) == ["</think>Hello<|im_end|>\n"]
    with_template(
        tokenizer,
        PHI.replace("|assistant|>\\n' }}{% else", "|assistant|>\\n<think> </think>' }}{% else"),
    )
    (example,) = tokenized(tmp_path, tokenizer, [{"messages": TWO[:2]}]).examples
    asked = of_transformers(tokenizer, [USER], add_generation_prompt=True)
    assert list(example.input_ids[: example.target_start]) == asked
    assert learned(tokenizer, example) == ["Hello<|end|>\n</s>"]


@pytest.mark.parametrize("ends", [["<|im_end|>"], ["</s>", "<|im_end|>"]])
def test_labels_end_at_the_token_that_ends_generation(tmp_path, tokenizer, ends):
    with_template(tokenizer, CHATML)
    path, task = tmp_path / "d.jsonl", make_task()
    path.write_text(json.dumps({"messages": TWO}) + "\n")
    ids = tokenizer.convert_tokens_to_ids(ends)
    (example,) = tokenize(load_rows(str(path), task), task, tokenizer, 100, end_ids=ids).examples
    assert learned(tokenizer, example) == ["Hello<|im_end|>", "Fine<|im_end|>"]
    assert list(example.input_ids) == of_transformers(tokenizer, TWO)


@pytest.mark.parametrize("source", [QWEN_3_5, QWEN_3_5_MARKED])
def test_a_generation_prompt_whose_end_merges_with_the_answer_keeps_its_tokens(
    tmp_path, tokenizer, source
):
    """It ends with a line break, and the answer begins with one: together they are one token."""
    with_template(tokenizer, source)
    rows = [{"messages": TWO}, {"messages": TWO[:2]}]
    tokens = tokenized(tmp_path, tokenizer, rows)
    first, last, alone = *tokens.examples[0].linear(), tokens.examples[1]
    assert alone == replace(first, row=1)
    for messages, example in ((TWO[:2], first), (TWO, last)):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert "<think>\n\n</think>" in text
        assert tokenizer.decode(example.input_ids) == text
        assert list(example.input_ids) != of_transformers(tokenizer, messages)
        asked = of_transformers(tokenizer, messages[:-1], add_generation_prompt=True)
        assert list(example.input_ids[: example.target_start]) == asked
        assert learned(tokenizer, example) == [
            f"\n</think>\n\n{messages[-1]['content']}<|im_end|>\n"
        ]
    (warning,) = tokens.warnings
    assert "(in 2 of 2 rows)" in warning


def test_turns_of_weight_0_are_read_and_not_learned(tmp_path, tokenizer):
    with_template(tokenizer, CHATML)
    rows = [[USER, ANSWER | {"weight": 0}, *TWO[2:3], TWO[3] | {"weight": 1}], TWO]
    examples = tokenized(tmp_path, tokenizer, [{"messages": row} for row in rows]).examples
    assert examples[0].input_ids == examples[1].input_ids
    assert learned(tokenizer, examples[0]) == ["Fine<|im_end|>\n"]
    with_template(tokenizer, GPT_OSS_MARKED)
    (marked, _) = tokenized(tmp_path, tokenizer, [{"messages": row} for row in rows]).examples
    assert learned(tokenizer, marked) == ["<|channel|>final<|message|>Fine<|return|>"]


def test_content_may_be_parts_of_text(tmp_path, tokenizer):
    """As the template reads parts; joined where it reads text only."""
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "And?"}]
    in_parts = [{"role": "user", "content": parts}, ANSWER]
    for source, same in ((CHATML, "Hi And?"), (PARTS, "HiAnd?")):
        with_template(tokenizer, source)
        (example,) = tokenized(tmp_path, tokenizer, [{"messages": in_parts}]).examples
        assert tokenizer.decode(example.input_ids) == (
            f"<|im_start|>user\n{same}<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        )
    asked = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert encode_request(tokenizer, DIALOGUES, "Hi")[0] == of_transformers(
        tokenizer, asked, add_generation_prompt=True
    )


@pytest.mark.parametrize("content", [{"content": None}, {}])
def test_content_may_be_null_beside_tool_calls(tmp_path, tokenizer, content):
    with_template(tokenizer, CHATML)
    messages = [USER, CALL | content, *CALLS[2:]]
    (example,) = tokenized(tmp_path, tokenizer, [{"messages": messages}]).examples
    assert list(example.input_ids) == of_transformers(tokenizer, messages)
    assert learned(tokenizer, example)[0] == '<tool_call>add{"a": 1}<|im_end|>\n'


WITHOUT_TEXT = CHATML.replace(
    "if message.content %}", "if message.content and not message.tool_calls %}"
)


@pytest.mark.parametrize(
    ("source", "turn", "omits"),
    [
        (CHATML, CALL | {"content": "I add them."}, False),
        (WITHOUT_TEXT, CALL | {"content": "I add them."}, True),
        (WITHOUT_TEXT, CALL | {"content": None}, False),
        (CHATML, ANSWER | {"reasoning_content": "They greet me."}, True),
        (CHATML, ANSWER | {"reasoning_content": " "}, False),
        (
            CHATML.replace("+ message.content", "+ (message.thinking or '') + message.content"),
            ANSWER | {"thinking": "They greet me.\n"},
            False,
        ),
    ],
)
def test_parts_of_an_answer_that_a_template_omits_give_a_warning(
    tmp_path, tokenizer, source, turn, omits
):
    with_template(tokenizer, source)
    rows = [{"messages": TWO}, {"messages": [USER, turn]}, {"messages": [USER, turn]}]
    (warning, *_) = tokenized(tmp_path, tokenizer, rows).warnings or ("",)
    assert ("the chat template does not write the reasoning of an answer" in warning) == omits
    if omits:
        assert ".jsonl:2: " in warning
        assert "(in 2 of 3 rows)" in warning


@pytest.mark.parametrize("written", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]])
def test_tools_of_a_row_are_given_to_the_template(tmp_path, tokenizer, written):
    with_template(tokenizer, CHATML)
    rows = [{"messages": CALLS, "tools": written}, {"messages": CALLS, "tools": None}]
    rows += [{"messages": CALLS}, {"messages": CALLS, "tools": []}]
    first, *others = tokenized(tmp_path, tokenizer, rows).examples
    assert list(first.input_ids) == of_transformers(tokenizer, CALLS, tools=TOOLS)
    for example in others:
        assert list(example.input_ids) == of_transformers(tokenizer, CALLS)
    named = [{"messages": CALLS, "functions": written}]
    (example,) = tokenized(tmp_path, tokenizer, named, tools="functions").examples
    assert example.input_ids == first.input_ids
    (example,) = tokenized(tmp_path, tokenizer, rows[:1], tools=None).examples
    assert example.input_ids == others[0].input_ids


def test_an_empty_list_of_tools_is_no_tools(tmp_path, tokenizer):
    """Llama 3.1 announces functions to call where the list is not none."""
    with_template(tokenizer, CHATML.replace("if tools", "if tools is not none"))
    rows = [{"messages": TWO, "tools": tools} for tools in (None, [], "[]", TOOLS)]
    without, *empty, given = tokenized(tmp_path, tokenizer, rows).examples
    assert [example.input_ids for example in empty] == [without.input_ids] * 2
    assert given.input_ids != without.input_ids


def test_tools_that_cannot_be_given_are_refused(tmp_path, tokenizer):
    with_template(tokenizer, PHI)
    rows = [{"messages": TWO[:2], "tools": TOOLS}]
    with pytest.raises(
        BadInput, match=r"d\.jsonl:1: messages: the chat template ignores the tools"
    ):
        tokenized(tmp_path, tokenizer, rows)
    with pytest.raises(BadInput, match=r"tools: 'hammer' is not JSON|tools: is not JSON"):
        tokenized(tmp_path, tokenizer, [{"messages": TWO, "tools": "hammer"}])
    with pytest.raises(BadInput, match=r"no column 'functions', which tasks\.t\.tools uses"):
        tokenized(tmp_path, tokenizer, rows, tools="functions")
    for settings in ({"tools": "messages"}, {"messages": None, "input": "{a}", "tools": "b"}):
        with pytest.raises(ValueError, match="tools: "):
            make_task(**settings)


@pytest.mark.parametrize("content", ["", "Hi"])
def test_calls_and_results_that_the_template_ignores_are_refused(tmp_path, tokenizer, content):
    """Otherwise an empty answer, or an answer without the result, would be learned."""
    with_template(tokenizer, PHI)
    call = CALL | {"content": content}
    with pytest.raises(BadInput, match=r"\[1\]: the chat template does not write all tool_calls"):
        tokenized(tmp_path, tokenizer, [{"messages": [USER, call]}])
    with_template(
        tokenizer, CHATML.replace("message.tool_calls or []", "(message.tool_calls or [])[:1]")
    )
    for other in ("add", "multiply"):  # after gpt-oss, which writes the first call only
        second = json.loads(json.dumps(CALL["tool_calls"]).replace('"add"', f'"{other}"'))
        calls = call | {"tool_calls": [*CALL["tool_calls"], *second]}
        with pytest.raises(BadInput, match="the chat template does not write all tool_calls"):
            tokenized(tmp_path, tokenizer, [{"messages": [USER, calls, *CALLS[2:]]}])
    without = CHATML.replace("messages %}", "messages if message.role != 'tool' %}")
    with_template(tokenizer, without)
    with pytest.raises(BadInput, match="the chat template ignores turns of the tool"):
        tokenized(tmp_path, tokenizer, [{"messages": [USER, call, *CALLS[2:]]}])
    with_template(tokenizer, PHI)
    rows = [{"messages": [USER, call | {"weight": 0}, *CALLS[2:]]}]
    (example,) = tokenized(tmp_path, tokenizer, rows).examples
    assert learned(tokenizer, example) == ["Hello<|end|>\n</s>"]


def test_dialogues_of_sharegpt(tmp_path, tokenizer):
    with_template(tokenizer, CHATML)
    turns = [
        {"from": "system", "value": "Fine"},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "add", "weight": 0},
        {"from": "function", "value": "3"},
        {"from": "gpt", "value": "Hello"},
    ]
    rows = [{"conversations": turns}]
    (example,) = tokenized(tmp_path, tokenizer, rows, messages="conversations").examples
    roles = ["system", "user", "assistant", "tool", "assistant"]
    same = [
        {"role": role, "content": turn["value"]} for role, turn in zip(roles, turns, strict=True)
    ]
    assert list(example.input_ids) == of_transformers(tokenizer, same)
    assert learned(tokenizer, example) == ["Hello<|im_end|>\n"]


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"content": [{"type": "image"}]}, "[0].content[0]: {'type': 'image'} is not a text part"),
        ({"content": ["Hi"]}, "[0].content[0]: 'Hi' is not a text part"),
        ({"content": []}, "[0].content: is empty"),
        ({"content": {"text": "Hi"}}, "[0].content: {'text': 'Hi'} must be a string or a list of"),
        ({"weight": 1}, "[0].weight: is 1, but only turns of the assistant are learned"),
        ({"weight": 0.5}, "[0].weight: is 0.5; it must be 1"),
        ({"content": None}, "[0] is {'role': 'user'}; a turn has role and content"),
    ],
)
def test_turns_that_are_refused(tmp_path, tokenizer, turn, expected):
    with pytest.raises(BadInput) as caught:
        tokenized(tmp_path, tokenizer, [{"messages": [USER | turn, ANSWER]}])
    assert caught.value.problems[0].startswith(f"{tmp_path}/d.jsonl:1: messages: {expected}")
    only = [USER, ANSWER | {"weight": 0}]
    with pytest.raises(BadInput, match="weight: is 0 in all turns of the assistant"):
        tokenized(tmp_path, tokenizer, [{"messages": only}])
    robot = [{"from": "robot", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    with pytest.raises(BadInput, match=r"\[0\]\.from: 'robot' is not one of human, gpt, "):
        tokenized(tmp_path, tokenizer, [{"messages": robot}])


# Dates


@pytest.mark.parametrize(
    "source",
    [
        DATED,
        GPT_OSS,
        "\n\n  {{- strftime_now('%A, %-d %B %y %j %H:%M:%S %p 100%%Y') }}" + CHATML,
        "\n{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- endif %}"
        "{{ day }} {{ strftime_now('%Y') | int + 1 }}" + CHATML,
    ],
)
def test_a_fixed_day_is_what_transformers_writes_on_that_day(tokenizer, monkeypatch, source):
    day = datetime.date(2024, 2, 9)

    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Then:
            return cls(day.year, day.month, day.day)

    with_template(tokenizer, source)
    dialogue = DialogueEncoder(tokenizer, day)(TWO[:2])
    opening = encode_request(tokenizer, DIALOGUES, "Hi", date=day)[0]
    monkeypatch.setattr(chat_template_utils, "datetime", Then)
    assert dialogue.ids == of_transformers(tokenizer, TWO[:2])
    assert opening == of_transformers(tokenizer, [USER], add_generation_prompt=True)


def test_the_cache_key_includes_the_date(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("PROMPTSHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("trainer.data.tokenization.tokenize.MANY_ROWS", 1)
    monkeypatch.setattr("trainer.data.tokenization.worker_pool.num_cores", lambda: 1)
    path, task = tmp_path / "d.jsonl", make_task()
    path.write_text(json.dumps({"messages": TWO[:2]}) + "\n")
    rows = load_rows(str(path), task)
    days = [datetime.date(2024, 2, 9), datetime.date(2024, 2, 10)]
    for source, tables in ((DATED, 2), (CHATML, 3)):
        with_template(tokenizer, source)
        for day in days:
            for _ in range(2):
                (example,) = tokenize(rows, task, tokenizer, 100, date=day).examples
                assert list(example.input_ids) == DialogueEncoder(tokenizer, day)(TWO[:2]).ids
        assert len([p for p in cache_dir("tokens").iterdir() if p.is_dir()]) == tables


def test_a_run_keeps_its_chat_date(tmp_path):
    assert read_chat_date(tmp_path) is None
    keep_chat_date(tmp_path, datetime.date(2024, 2, 9))
    assert read_chat_date(tmp_path) == datetime.date(2024, 2, 9)
    (tmp_path / CHAT_DATE).write_text("yesterday")
    with pytest.raises(BadInput, match="write the date of the run's first start, as 2026-01-31"):
        read_chat_date(tmp_path)


def test_the_first_start_sets_the_chat_date(tmp_path, tokenizer):
    config = SimpleNamespace(tasks=[make_task()])
    for source, first in ((DATED, datetime.date.today()), (CHATML, None)):
        files: Any = SimpleNamespace(tokenizer=with_template(tokenizer, source))
        (tmp_path / CHAT_DATE).unlink(missing_ok=True)
        assert run._chat_date(files, config, tmp_path, fresh=False) == first
        keep_chat_date(tmp_path, datetime.date(2024, 2, 9))
        later = first and datetime.date(2024, 2, 9)
        assert run._chat_date(files, config, tmp_path, fresh=False) == later
        assert run._chat_date(files, config, tmp_path, fresh=True) == first


# Templates that do not end


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 0.3 s of CPU time; repair the template",
        ),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
            "takes more than 0.3 s of CPU time; repair the template",
        ),
        ("{{ 'a' * 3000000 }}", "writes 3,000,000 characters for a dialogue of 54"),
        ("{{ 'a' * 10 ** 14 }}", "takes more memory than there is"),
    ],
)
def test_a_template_that_does_not_end_is_refused(
    tmp_path, tokenizer, monkeypatch, source, expected
):
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 0.3)
    start = "tasks.t.messages: the chat template of base.model "
    with_template(tokenizer, source)
    with pytest.raises(BadInput) as caught:
        tokenized(tmp_path, tokenizer, [{"messages": TWO}])
    assert caught.value.problems[0].startswith(start + expected)
    later = "{% if messages | length > 2 %}" + source + "{% endif %}" + CHATML
    with_template(tokenizer, later)
    with pytest.raises(BadInput) as caught:
        tokenized(tmp_path, tokenizer, [{"messages": TWO}] * 20)
    (problem,) = caught.value.problems
    assert problem.startswith("tasks.t.messages: row 1: the chat template of base.model ")


def test_a_template_that_ends_in_time_is_accepted():
    for _ in range(3):
        with cpu_limit(5.0):
            assert sum(range(1000)) == 499500

    def endless() -> None:
        while True:
            time.sleep(0)

    with pytest.raises(CpuLimitExceeded), cpu_limit(0.05):
        endless()
    with cpu_limit(5.0):
        assert sum(range(1000)) == 499500
