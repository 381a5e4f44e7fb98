"""Answers after reasoning, under templates whose generation prompt opens or closes its block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.stock_templates import SPECIALS
from tests.tokenizers_of_families import make_tokenizer
from trainer.config import RunConfig, Task
from trainer.data.prompt_positions import with_positions
from trainer.data.splits import load_rows
from trainer.data.token_table import Example
from trainer.data.tokenization.tokenize import tokenize
from trainer.runtime.errors import BadInput

#: After DeepSeek R1 and its distilled models: a dialogue has no reasoning, and its answers keep the
#: line breaks between reasoning and answer.
R1 = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|User|>' + m.content }}
    {%- elif m.role == 'assistant' %}
        {{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}
    {%- else %}{{- m.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}"""
#: After the first release of R1: the base writes the beginning of the block itself.
R1_FIRST = R1.replace("<think>\\n", "")
#: After QwQ: white space before the answer is left out as well.
QWQ = """\
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if m.role == 'assistant' %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""
#: After Qwen3-Thinking-2507: only the last answer has its reasoning, or an empty block.
QWEN_THINKING = """\
{%- for m in messages %}
    {%- set content = m.content %}
    {%- set thoughts = m.reasoning_content if m.reasoning_content is string else '' %}
    {%- if m.role == 'assistant' and '</think>' in content %}
        {%- set thoughts = content.split('</think>')[0].split('<think>')[-1] %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.last %}
        {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""
#: After Nemotron Nano 2: the last answer follows the beginning of the block as it is.
NANO = """\
{%- set begin = '<think></think>' if '/no_think' in messages[0].content else '<think>\\n' %}
{%- for m in messages %}
    {%- set content = m.content | trim %}
    {%- if m.role == 'assistant' and not loop.last %}
        {{- '<|im_start|>assistant\\n' + content.split('</think>')[-1] | trim }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + begin + content }}
    {%- else %}{{- '<|im_start|>' + m.role + '\\n' + content.replace('/no_think', '') | trim }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + begin }}
{%- endif %}"""
#: After DeepSeek V3.1: a dialogue has the end of the block only.
V3_1 = """\
{%- set opens = thinking is defined and thinking %}
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|User|>' + m.content }}
    {%- elif m.role == 'assistant' %}
        {{- '<|Assistant|></think>' + m.content.split('</think>', 1)[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|Assistant|>' + ('<think>' if opens else '</think>') }}
{%- endif %}"""
#: After Qwen 3 with ``enable_thinking: false``.
NO_THINKING = QWEN_THINKING.replace(
    "assistant\\n<think>\\n'",
    "assistant\\n' + ('' if enable_thinking | default(true) else '<think>\\n\\n</think>\\n\\n')",
)

#: Writes the content of every turn unchanged.
CHATML = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n'}}{%- endif %}"""

USER, MORE = {"role": "user", "content": "Hi"}, {"role": "user", "content": "And?"}
OPEN_LINE = "Hi\n</think>\n\nFine"


def answer(content: str, **keys: str) -> dict[str, str]:
    return {"role": "assistant", "content": content, **keys}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = ["Hi Hello And? Fine\n\nToday: system user assistant final it is </think>"] * 20
    return make_tokenizer("llama3", texts, specials=SPECIALS)


def example_of(
    folder: Path, tokenizer: Any, source: str, messages: list, **variables: Any
) -> Example:
    tokenizer.chat_template = source
    path = folder / "d.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    task = Task(
        name="t", train="x.jsonl", messages="messages", chat_template_kwargs=dict(variables)
    )
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    (row,) = tokenize(load_rows(str(path), task), task, tokenizer, 400, end_ids=ends).examples
    return row


def learned_after(tokenizer: Any, row: Example, messages: list, **variables: Any) -> str:
    """What the row learns directly after the generation prompt that follows the messages."""
    opening = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **variables)
    (learned,) = {
        text.input_ids[start:stop]
        for text in row.linear()
        for start, stop in text.label_spans
        if list(text.input_ids[:start]) == opening["input_ids"]
    }
    return str(tokenizer.decode(learned))


@pytest.mark.parametrize(
    ("source", "turn", "expected"),
    [
        (R1, answer("<think>\nHi\n</think>\n\nFine"), OPEN_LINE + "</s>"),
        (R1, answer("Hi\n</think>\n\nFine"), OPEN_LINE + "</s>"),
        (R1, answer("<think>Hi</think>Fine"), "Hi</think>Fine</s>"),
        (R1, answer("<think>\n\n</think>\n\nFine"), "\n</think>\n\nFine</s>"),
        (R1, answer("</think>\n\nFine"), "</think>\n\nFine</s>"),
        (R1, answer("Hi\n</think>\n\nFine </think> it"), "Hi\n</think>\n\nFine </think> it</s>"),
        (R1, answer("Fine", reasoning_content="Hi"), OPEN_LINE + "</s>"),
        (R1, answer("\n\nFine", reasoning_content="Hi\n"), OPEN_LINE + "</s>"),
        (R1, answer("Fine", thinking="Hi"), OPEN_LINE + "</s>"),
        (R1, answer("Fine", reasoning="Hi"), OPEN_LINE + "</s>"),
        (R1_FIRST, answer("<think>\nHi\n</think>\n\nFine"), "<think>\n" + OPEN_LINE + "</s>"),
        (R1_FIRST, answer("Fine"), "Fine</s>"),
        (QWQ, answer("<think>\nHi\n</think>\n\nFine"), OPEN_LINE + "<|im_end|>"),
        (QWQ, answer("Fine", reasoning_content="Hi"), OPEN_LINE + "<|im_end|>"),
        (QWEN_THINKING, answer("Fine", reasoning_content="\nHi\n"), OPEN_LINE + "<|im_end|>"),
        (QWEN_THINKING, answer("<think>\nHi\n</think>\n\nFine"), OPEN_LINE + "<|im_end|>"),
        (QWEN_THINKING, answer("Fine"), "\n</think>\n\nFine<|im_end|>"),
        (NANO, answer("<think>\nHi\n</think>\nFine"), "Hi\n</think>\nFine<|im_end|>"),
        (NANO, answer("Hi\n</think>\n\nFine"), OPEN_LINE + "<|im_end|>"),
        (NANO, answer("Fine", reasoning_content="Hi"), OPEN_LINE + "<|im_end|>"),
    ],
)
def test_reasoning_is_learned_after_the_block_that_the_generation_prompt_opens(
    tmp_path, tokenizer, source, turn, expected
):
    """In a dialogue of one answer and of two; the next generation prompt is the template's."""
    row = example_of(tmp_path, tokenizer, source, [USER, turn])
    assert learned_after(tokenizer, row, [USER]) == expected
    row = example_of(tmp_path, tokenizer, source, [USER, turn, MORE, turn])
    assert learned_after(tokenizer, row, [USER]) == expected
    assert learned_after(tokenizer, row, [USER, turn, MORE]) == expected
    assert sum(text.num_labels for text in row.linear()) == row.num_labels


@pytest.mark.parametrize("source", [CHATML, CHATML.replace("'}}", "<think>\\n'}}")])
@pytest.mark.parametrize(
    "content",
    ["<think>\nHi</think> And? <think>it</think> Fine", "<think>\nHi <think> is </think> final"],
)
def test_content_with_several_tags_is_learned_as_the_template_writes_it(
    tmp_path, tokenizer, source, content
):
    row = example_of(tmp_path, tokenizer, source, [USER, answer(content)])
    opened = "<think>\n" if source != CHATML else ""
    wanted = content.removeprefix(opened) + "<|im_end|>"
    assert learned_after(tokenizer, row, [USER]) == wanted


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (answer("<think>Hi</think>Fine"), "Hi</think>Fine</s>"),
        (answer("Fine", reasoning_content="Hi"), "Hi</think>Fine</s>"),
        (answer("Fine"), "</think>Fine</s>"),
    ],
)
def test_a_variable_opens_the_block(tmp_path, tokenizer, turn, expected):
    row = example_of(tmp_path, tokenizer, V3_1, [USER, turn], thinking=True)
    assert learned_after(tokenizer, row, [USER], thinking=True) == expected


@pytest.mark.parametrize(
    ("source", "first", "variables"),
    [
        (V3_1, USER, {}),
        (V3_1, USER, {"thinking": False}),
        (NO_THINKING, USER, {"enable_thinking": False}),
        (NANO, {"role": "user", "content": "Hi /no_think"}, {}),
    ],
)
def test_a_block_that_the_generation_prompt_closes_is_not_learned(
    tmp_path, tokenizer, source, first, variables
):
    row = example_of(tmp_path, tokenizer, source, [first, answer("Fine")], **variables)
    assert learned_after(tokenizer, row, [first], **variables).startswith("Fine")
    for turn in (answer("Fine", reasoning_content="Hi"), answer("<think>\nHi\n</think>\n\nFine")):
        with pytest.raises(BadInput, match="has reasoning, but the generation prompt") as caught:
            example_of(tmp_path, tokenizer, source, [first, turn], **variables)
        (problem,) = caught.value.problems
        remedy = {V3_1: "to thinking: true", NO_THINKING: "to enable_thinking: true"}
        assert remedy.get(source, "use another base.chat_template") in problem


@pytest.mark.parametrize("source", [R1, QWQ, NANO])
def test_an_answer_without_reasoning_is_refused_where_nothing_closes_the_block(
    tmp_path, tokenizer, source
):
    with pytest.raises(BadInput) as caught:
        example_of(tmp_path, tokenizer, source, [USER, answer("Fine")])
    (problem,) = caught.value.problems
    assert problem.startswith(
        f"{tmp_path}/d.jsonl:1: messages: [1]: the generation prompt of the chat template opens "
        "<think>, and neither the row nor the template closes it before the answer; give"
    )
    both = source + "{% if thinking %}{% endif %}"
    with pytest.raises(BadInput, match="chat_template_kwargs to thinking: false, give"):
        example_of(tmp_path, tokenizer, both, [USER, answer("Fine")])


def test_user_text_that_ends_in_a_tag_is_no_generation_prompt(tmp_path, tokenizer):
    """A template may have no generation prompt, and mention tags."""
    source = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ '</s>' }}"
        "{% endif %}{% endfor %}{# <think> #}"
    )
    asked = {"role": "user", "content": "Hi <b>"}
    row = example_of(tmp_path, tokenizer, source, [asked, answer("Fine")])
    assert learned_after(tokenizer, row, [asked]) == "Fine</s>"


def test_virtual_tokens_are_in_the_system_turn_by_default(tmp_path, tokenizer):
    """Also under a template that answers without reasoning do not close."""
    tokenizer.chat_template = R1
    config = RunConfig(
        output_dir=str(tmp_path),
        base={"model": "x"},
        tasks=[{"name": "t", "train": "x.jsonl", "messages": "messages"}],
        prompts=[{"name": "p", "task": "t", "num_virtual_tokens": 4}],
        training={"steps": 1},
    )
    assert with_positions(config, tokenizer).prompts[0].position == "system"
