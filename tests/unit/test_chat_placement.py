"""Virtual tokens, hard prompts, choices and teachers inside dialogues, beside transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.stock_templates import SPECIALS, STOCK
from tests.tokenizers_of_families import make_tokenizer
from tests.unit.test_stock_templates import SYSTEM, TEXTS, TURNS, continuation, of_transformers
from trainer.config import RunConfig, Task
from trainer.data.dataset import gold_choices
from trainer.data.preview import preview
from trainer.data.prompt_positions import texts_before, with_positions
from trainer.data.splits import load_rows
from trainer.data.task_data import load_tasks
from trainer.data.teacher import teachers_of
from trainer.data.token_table import Example
from trainer.data.tokenization.tokenize import encode_request, tokenize
from trainer.runtime.errors import BadInput

MARK = "\ue000"
DIALOGUES = {"without system": TURNS[:2], "with system": [SYSTEM, *TURNS[:2]]}
CHATML = STOCK["smollm2"]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    kinds = {stock.kind for stock in STOCK.values()}
    return {kind: make_tokenizer(kind, TEXTS, specials=SPECIALS) for kind in kinds}


@pytest.fixture
def tokenizer(tokenizers: dict[str, Any]) -> Any:
    made = tokenizers[CHATML.kind]
    made.chat_template = CHATML.source
    return made


def dialogues(**settings: Any) -> Task:
    return Task(name="t", train="x.jsonl", messages="messages", **settings)


def classification(**settings: Any) -> Task:
    values = {"input": "Hi {text}", "target": "{label}", "choices": ["Hello.", "Fine, so 3"]}
    return Task(name="t", train="x.jsonl", chat=True, metric="accuracy", **(values | settings))


def examples(folder: Path, task: Task, tokenizer: Any, rows: list[dict], **how: Any) -> Any:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ends = tokenizer.convert_tokens_to_ids(list(CHATML.ends))
    data = load_rows(str(path), task)
    return tokenize(data, task, tokenizer, 1000, **({"end_ids": ends} | how)).examples


def marked(messages: list[dict], position: str) -> list[dict]:
    """The turns with the mark, written by hand."""
    if position == "system" and messages[0]["role"] != "system":
        return [{"role": "system", "content": MARK}, *messages]
    number = next(i for i, turn in enumerate(messages) if turn["role"] == position)
    turn = {**messages[number], "content": MARK + messages[number]["content"]}
    return [*messages[:number], turn, *messages[number + 1 :]]


def labels(example: Example) -> list[int]:
    return [i for start, stop in example.label_spans for i in example.input_ids[start:stop]]


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("position", ["system", "user"])
@pytest.mark.parametrize("family", STOCK)
def test_virtual_tokens_inside_a_turn(tmp_path, tokenizers, family, position, dialogue) -> None:
    stock, messages = STOCK[family], DIALOGUES[dialogue]
    if not stock.system and (position == "system" or dialogue == "with system"):
        pytest.skip("the template has no system turn")
    tokenizer = tokenizers[stock.kind]
    tokenizer.chat_template = stock.source
    task = dialogues(chat_template_kwargs=dict(stock.variables))
    how: dict[str, Any] = {"end_ids": tokenizer.convert_tokens_to_ids(list(stock.ends))}
    rows = [{"messages": messages}]
    (row,) = examples(tmp_path, task, tokenizer, rows, position=position, **how)
    (front,) = examples(tmp_path, task, tokenizer, rows, **how)
    asked = tokenizer.apply_chat_template(
        marked(messages, position)[:-1],
        tokenize=False,
        add_generation_prompt=True,
        **stock.variables,
    )
    before, _, after = asked.partition(MARK)
    before_ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    assert list(row.input_ids[: row.prompt_at]) == before_ids
    opening = row.input_ids[row.prompt_at : row.target_start]
    assert list(opening) == continuation(tokenizer, [], after)
    assert labels(row) == labels(front)
    assert (front.prompt_at, front.prompt_end) == (0, 0)
    assert row.prompt_at <= row.prompt_end <= row.target_start


@pytest.mark.parametrize("position", ["front", "system", "user"])
def test_rows_of_input_and_target_are_dialogues(tmp_path, tokenizer, position) -> None:
    rows = [{"text": "And?", "label": "Fine, so 3"}, {"text": "Hi", "label": "Hello."}]
    turns = [
        {
            "messages": [
                {"role": "user", "content": f"Hi {row['text']}"},
                {"role": "assistant", "content": row["label"]},
            ]
        }
        for row in rows
    ]
    written = examples(tmp_path, classification(), tokenizer, rows, position=position)
    messages = examples(tmp_path, dialogues(), tokenizer, turns, position=position)
    assert [(e.input_ids, e.label_spans, e.prompt_at) for e in written] == [
        (e.input_ids, e.label_spans, e.prompt_at) for e in messages
    ]
    request = encode_request(tokenizer, classification(), "And?", position=position)
    row = written[0]
    assert request == (list(row.input_ids[: row.target_start]), row.prompt_at)


def test_fixed_text_of_the_template_is_once_in_a_packed_batch(tmp_path, tokenizer) -> None:
    rows = [{"text": "And?", "label": "Hello."}, {"text": "3 is it", "label": "Hello."}]
    task = classification(system="Be brief.")
    table = examples(tmp_path, task, tokenizer, rows, position="system")
    fixed = table.leading
    text = tokenizer.decode(list(fixed.input_ids))
    assert text.endswith("Be brief.<|im_end|>\n<|im_start|>user\nHi")
    assert fixed.prompt_at > 0
    placed = classification(input="Be {virtual_tokens} brief. {text}")
    leading = examples(tmp_path, placed, tokenizer, rows).leading
    assert tokenizer.decode(list(leading.input_ids[: leading.prompt_at])).endswith("user\nBe ")
    assert tokenizer.decode(list(leading.input_ids[leading.prompt_at :])) == " brief."


@pytest.mark.parametrize("position", ["system", "user"])
def test_rows_of_keys_and_values_begin_at_their_place(tmp_path, tokenizer, position) -> None:
    config = config_of(tmp_path, CLASSIFY, {"position": position, "method": "prefix_tuning"})
    placement, task = config.prompts[0].placement, config.tasks[0]
    assert placement == f"after {position}"
    rows = [{"text": "And?", "label": "Hello."}, {"text": "3 is it", "label": "Fine, so 3"}]
    whole = examples(tmp_path, task, tokenizer, rows, position=position)
    begun = examples(tmp_path, task, tokenizer, rows, position=placement)
    before = texts_before(config, tokenizer)["p0"]
    assert tokenizer.decode(before).endswith(f"<|im_start|>{position}\n")
    for one, other in zip(whole, begun, strict=True):
        assert list(one.input_ids) == [*before, *other.input_ids]
        assert labels(one) == labels(other)
        assert (other.prompt_at, other.prompt_end) == (0, one.prompt_end - len(before))
    ids, at = encode_request(tokenizer, task, "And?", position=placement)
    assert (before + ids, at) == (encode_request(tokenizer, task, "And?", position=position)[0], 0)
    turns = [{"messages": TURNS[:2]}, {"messages": [SYSTEM, *TURNS[:2]]}]
    if position == "user":
        with pytest.raises(BadInput, match=r"differs from that of other rows.*position: front"):
            examples(tmp_path, dialogues(), tokenizer, turns, position=placement)


@pytest.mark.parametrize("position", ["front", "system", "user"])
def test_characters_of_the_private_use_area_are_text(tmp_path, tokenizer, position) -> None:
    rows = [{"text": "And\ue000? \uf8ff", "label": "Hello."}, {"text": "And", "label": "Hello."}]
    task = classification()
    row, other = examples(tmp_path, task, tokenizer, rows, position=position)
    assert row.prompt_at == other.prompt_at
    assert "And\ue000? \uf8ff" in tokenizer.decode(list(row.input_ids))


def test_text_that_the_template_ignores_is_refused(tmp_path, tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ '<|user|>' + m.content + '<|end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|user|>' }}{% endif %}"
    )
    ignored = "the chat template ignores turns of the system"
    rows = [{"text": "And?", "label": "Hello."}]
    with pytest.raises(BadInput, match=rf"tasks\.t\.system: {ignored}"):
        examples(tmp_path, classification(system="Be brief."), tokenizer, rows)
    with pytest.raises(BadInput, match=rf"tasks\.t\.hand_written: {ignored}"):
        examples(tmp_path, dialogues(), tokenizer, [{"messages": TURNS[:2]}], prefix="Add json")
    config = config_of(tmp_path, {"messages": "messages"}, DISTILL)
    with pytest.raises(BadInput, match=rf"prompts\.p0\.teacher: {ignored}"):
        teachers_of(config, tokenizer)


def test_choices_differ_in_the_answer_only(tmp_path, tokenizer) -> None:
    rows, task = [{"text": "And?", "label": "Fine, so 3"}], classification()
    first, second = examples(tmp_path, task, tokenizer, rows, per_choice=True)
    start = first.target_start
    assert first.input_ids[:start] == second.input_ids[:start]
    for example, choice in zip((first, second), task.choices, strict=True):
        answer = tokenizer.decode(list(example.input_ids[start : example.label_spans[0][1]]))
        assert answer == f"{choice}<|im_end|>"
    (own,) = examples(tmp_path, task, tokenizer, rows)
    assert own == second


def test_choices_of_dialogues(tmp_path, tokenizer) -> None:
    """The last answer is the label; earlier ones are part of the input."""
    task = dialogues(choices=["Fine, so 3", "it is"], metric="accuracy")
    rows = [{"messages": TURNS[:4]}]
    first, _ = examples(tmp_path, task, tokenizer, rows, per_choice=True)
    (own,) = examples(tmp_path, task, tokenizer, rows)
    assert own == first
    assert len(own.label_spans) == 1
    assert own.target_start == len(
        of_transformers(tokenizer, CHATML, TURNS[:3], add_generation_prompt=True)
    )
    assert gold_choices(load_rows(str(tmp_path / "d.jsonl"), task), task) == [0]
    with pytest.raises(BadInput, match=r"the last answer is 'Hello\.', which is not one of"):
        examples(tmp_path, task, tokenizer, [{"messages": TURNS[:2]}])


def test_a_hand_written_prompt_is_text_of_the_system(tmp_path, tokenizer) -> None:
    for messages in DIALOGUES.values():
        rows = [{"messages": messages}]
        (row,) = examples(tmp_path, dialogues(), tokenizer, rows, prefix="Add json")
        own = messages[0]["content"] if messages[0]["role"] == "system" else ""
        system = {"role": "system", "content": "Add json" + (f"\n\n{own}" if own else "")}
        turns = [system, *[turn for turn in messages if turn["role"] != "system"]]
        (wanted,) = examples(tmp_path, dialogues(), tokenizer, [{"messages": turns}])
        assert row == wanted


@pytest.mark.parametrize("position", ["front", "system", "user"])
@pytest.mark.parametrize("prefix", ["", "Add json"])
def test_content_in_parts_is_kept_where_a_template_reads_the_first_part_only(
    tmp_path, tokenizers, position, prefix
) -> None:
    stock = STOCK["gemma3"]
    tokenizer = tokenizers[stock.kind]
    tokenizer.chat_template = stock.source
    parts = [
        turn | {"content": [{"type": "text", "text": turn["content"]}]}
        for turn in [SYSTEM, *TURNS[:2]]
    ]
    rows = [{"messages": [SYSTEM, *TURNS[:2]]}, {"messages": parts}]
    how: dict[str, Any] = {"end_ids": tokenizer.convert_tokens_to_ids(list(stock.ends))}
    how |= {"position": position, "prefix": prefix}
    text, in_parts = examples(tmp_path, dialogues(), tokenizer, rows, **how)
    assert in_parts.input_ids == text.input_ids
    assert in_parts.prompt_at == text.prompt_at


def config_of(tmp_path: Path, task: dict, *prompts: dict) -> RunConfig:
    values = {"name": "t", "train": str(tmp_path / "d.jsonl"), "validation_share": 0.0}
    return RunConfig.model_validate(
        {
            "output_dir": str(tmp_path / "out"),
            "base": {"model": "x"},
            "tasks": [values | task],
            "prompts": [{"name": f"p{i}", "task": "t"} | p for i, p in enumerate(prompts)],
            "training": {"steps": 1, "tokens_per_step": 64},
        }
    )


CLASSIFY = {"chat": True, "input": "Hi {text}", "target": "{label}"}


def positions(config: RunConfig) -> list[str]:
    return [prompt.position for prompt in config.prompts]


@pytest.mark.parametrize("task", [CLASSIFY, {"messages": "messages"}], ids=["chat", "messages"])
@pytest.mark.parametrize("family", STOCK)
def test_auto_is_the_turn_of_the_system_or_of_the_user(tmp_path, tokenizers, family, task) -> None:
    stock = STOCK[family]
    tokenizer = tokenizers[stock.kind]
    tokenizer.chat_template = stock.source
    task = task | {"chat_template_kwargs": dict(stock.variables)}
    config = config_of(tmp_path, task, {}, {"position": "front"}, {"method": "prefix_tuning"})
    # The text before keys and values has to be equal in all rows, which dialogues cannot promise.
    fixed = "messages" not in task
    assert positions(config) == ["auto", "front", "auto" if fixed else "front"]
    first, front, prefix = positions(with_positions(config, tokenizer))
    assert (front, prefix) == ("front", first if fixed else "front")
    # Mistral's templates write the text of the system into the last turn of the user.
    late = family in ("mistral", "mistral-v3") and "messages" in task
    assert first == ("system" if stock.system and not late else "user")
    rows = [{"messages": TURNS[:4], "text": "And?", "label": "Hello."}]
    how: dict[str, Any] = {"end_ids": tokenizer.convert_tokens_to_ids(list(stock.ends))}
    (row,) = examples(tmp_path, config.tasks[0], tokenizer, rows, position=first, **how)
    assert 0 < row.prompt_at < row.target_start


def test_auto_is_front_without_a_chat_template_or_beside_virtual_tokens_in_the_input(
    tmp_path, tokenizer
) -> None:
    text = {"input": "{text}", "target": "{label}"}
    placed = CLASSIFY | {"input": "{virtual_tokens} {text}"}
    for task in (text, placed):
        assert positions(config_of(tmp_path, task, {})) == ["front"]
        assert positions(with_positions(config_of(tmp_path, task, {}), None)) == ["front"]


def test_positions_of_a_checkpoint_have_priority_over_auto(tmp_path, tokenizer) -> None:
    config = config_of(tmp_path, CLASSIFY, {}, {}, {"position": "user"})
    saved = {"p0": "front", "p2": "front"}
    assert positions(with_positions(config, tokenizer, None, saved)) == ["front", "system", "user"]


DISTILL = {"objective": "distill", "teacher": "Add json", "num_virtual_tokens": 4}


@pytest.mark.parametrize("position", ["front", "system", "user"])
def test_a_teacher_is_read_as_text_of_the_system(tmp_path, tokenizer, position) -> None:
    task = dialogues()
    (taught,) = examples(tmp_path, task, tokenizer, [{"messages": TURNS[:2]}], prefix="Add json")
    (row,) = examples(tmp_path, task, tokenizer, [{"messages": TURNS[:2]}], position=position)
    config = config_of(tmp_path, {"messages": "messages"}, DISTILL | {"position": position})
    teacher = teachers_of(config, tokenizer)["p0"]
    after = teacher.continued_by(row)
    assert (*teacher.token_ids, *after.input_ids) == taught.input_ids
    assert (after.prompt_at, after.prompt_end) == (0, 0)
    assert labels(after) == labels(taught)


def test_a_teacher_at_the_virtual_tokens_is_tokenized_with_the_text_before_it(
    tmp_path, tokenizer
) -> None:
    settings = {"input": "Now {virtual_tokens} of {a}", "target": "{b}", "chat": True}
    config = config_of(tmp_path, settings, DISTILL)
    task, rows = config.tasks[0], [{"a": "x", "b": "yes"}]
    (taught,) = examples(tmp_path, task, tokenizer, rows, prefix="Add json")
    (row,) = examples(tmp_path, task, tokenizer, rows)
    teacher = teachers_of(config, tokenizer)["p0"]
    after = teacher.continued_by(row)
    ids, at = after.input_ids, after.prompt_at
    assert (*ids[:at], *teacher.token_ids, *ids[at:]) == taught.input_ids
    assert labels(after) == labels(taught)


def test_a_teacher_does_not_replace_text_of_the_rows(tmp_path, tokenizer) -> None:
    rows = [{"messages": TURNS[:2]}, {"messages": [SYSTEM, *TURNS[:2]]}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = with_positions(config_of(tmp_path, {"messages": "messages"}, DISTILL), tokenizer)
    problem = r"prompts\.p0\.teacher: .*d\.jsonl:2 has a turn of the system"
    with pytest.raises(BadInput, match=problem):
        load_tasks(config, tokenizer, 1000, 100_000)
    with pytest.raises(BadInput, match=problem):
        preview(config, tokenizer, 1000, 100_000, 5)


@pytest.mark.parametrize(
    ("task", "prompt", "problem"),
    [
        ({"input": "{a}", "target": "{b}"}, {"position": "user"}, "needs a dialogue; set chat"),
        (
            {"input": "{a}{virtual_tokens}", "target": "{b}", "chat": True},
            {"position": "user"},
            "already has",
        ),
        (
            {"messages": "m"},
            {"position": "user", "method": "prefix_tuning", **DISTILL},
            "not possible with prefix_tuning and objective: distill",
        ),
        ({"messages": "m", "system": "x"}, {}, "system: works with chat: true only"),
        ({"messages": "m", "chat": True}, {}, "chat: needs input and target"),
        ({"input": "{a}", "chat": True}, DISTILL, "target: is missing; chat needs the answer"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, task, prompt, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        config_of(tmp_path, task, prompt)


def test_a_template_without_system_turns_is_refused_by_row(tmp_path, tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ '<|user|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|user|>' }}{% endif %}"
    )
    with pytest.raises(BadInput, match="rejects this dialogue: no system"):
        examples(tmp_path, dialogues(), tokenizer, [{"messages": TURNS[:2]}], position="system")


@pytest.mark.parametrize("text", ["Hi", " Hi", "  Hi", "\nHi", "\n\n Hi", "\tHi"])
@pytest.mark.parametrize("kind", ["llama", "prepend", "first", "always", "gpt2", "llama3"])
def test_white_space_at_the_beginning_of_a_turn_follows_the_virtual_tokens(tmp_path, kind, text):
    """Rows and requests have the same ids on both sides of the virtual tokens."""
    tokenizer: Any = make_tokenizer(kind, ["Hi Hello user assistant\n\n"] * 9, specials=SPECIALS)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    task = Task(name="t", train="x.jsonl", chat=True, input="{text}", target="{label}")
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"text": text, "label": "Hello"}) + "\n")
    (row,) = tokenize(load_rows(str(path), task), task, tokenizer, 99, position="user").examples
    asked, place = encode_request(tokenizer, task, text, position="user")
    assert (list(row.input_ids[: row.target_start]), row.prompt_at) == (asked, place)
    header = tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    assert asked[:place] == header
    messages = [{"role": "user", "content": text}]
    plain = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(asked) == tokenizer.decode(plain)
    if text == "Hi" or plain[: len(header)] == header:
        assert asked == plain
