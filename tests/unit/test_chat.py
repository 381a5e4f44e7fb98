"""Dialogues and rows of token ids: the labels are the assistant's tokens, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer.config import Task
from trainer.data.dataset import RowDataset
from trainer.data.splits import load_rows
from trainer.data.tokenization.chat import DialogueEncoder
from trainer.data.tokenization.tokenize import Tokenized, encode_request, tokenize
from trainer.runtime.errors import BadInput

DIALOGUES = Task(name="t", train="x.jsonl", messages="messages")
WORDS = ["a", "b", "c", "d", "e", "f", "g", "hi", "there", "sys", "assistant", ","]
MARKS = ["<s>", "</s>", "<system>", "<user>", "<assistant>", "<tool>", "<end>", "<unk>"]

#: One turn after another, as ChatML.
PLAIN = (
    "{{ '<s>' }}{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
#: The same, with the assistant's words marked for transformers.
MARKED = (
    "{{ '<s>' }}{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
    "{{ ' ' }}{% generation %}{{ m.content + ' <end>' }}{% endgeneration %}{% else %}"
    "{{ ' ' + m.content + ' <end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
#: Earlier answers are left out once others follow, as reasoning models do.
FORGETS = (
    "{% for m in messages %}{{ '<' + m.role + '> ' }}"
    "{% if loop.last or m.role != 'assistant' %}{{ m.content }}{% endif %}{{ ' <end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"

TURNS = [
    {"role": "system", "content": "sys"},
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e f g"},
]


def make_tokenizer(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*MARKS, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<system>", "<user>", "<assistant>", "<tool>", "<end>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def make_task(**settings) -> Task:
    return Task(name="t", train="x.jsonl", messages="messages", **settings)


def load(folder: Path, dialogues: list, task: Task) -> RowDataset:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps({"messages": d}) + "\n" for d in dialogues))
    return load_rows(str(path), task)


def words(tokenizer, ids) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))


def learnt(tokenizer, tokenized: Tokenized) -> list[list[str]]:
    return [
        [words(tokenizer, e.input_ids[start:stop]) for start, stop in e.label_spans]
        for e in tokenized.examples
    ]


#: A mark on white space, which has no token: transformers finds no turn.
MISPLACED = MARKED.replace("{{ ' ' }}{% generation %}{{ m", "{% generation %}{{ ' ' + m")


@pytest.mark.parametrize("template", [PLAIN, MARKED, MISPLACED])
def test_only_the_assistants_turns_are_learnt(template):
    tokenizer = make_tokenizer(template)
    dialogue = DialogueEncoder(tokenizer)(TURNS)
    ids, spans = dialogue.ids, dialogue.spans
    assert not dialogue.merged
    assert (
        words(tokenizer, ids) == "<s> <system> sys <end> <user> a b <end> <assistant> c <end> "
        "<user> d <end> <assistant> e f g <end>"
    )
    assert [words(tokenizer, ids[a:b]) for a, b in spans] == ["c <end>", "e f g <end>"]
    assert ids[: spans[0][0]] == list(
        tokenizer.apply_chat_template(TURNS[:2], add_generation_prompt=True)["input_ids"]
    )


def test_the_prompt_of_generation_is_that_of_training():
    tokenizer = make_tokenizer()
    dialogue = DialogueEncoder(tokenizer)(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    )
    assert encode_request(tokenizer, DIALOGUES, "hi")[0] == dialogue.ids[: dialogue.spans[0][0]]
    with pytest.raises(BadInput, match=r"base\.model: .* rejects this dialogue: no answers here"):
        encode_request(make_tokenizer("{{ raise_exception('no answers here') }}"), DIALOGUES, "hi")


def test_calls_that_a_template_cannot_write_are_named():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "c"},
    ]
    encode = DialogueEncoder(make_tokenizer(PLAIN))
    with pytest.raises(
        ValueError, match=r"rejects this dialogue: .*; \[1\] has tool_calls without"
    ):
        encode(turns)


def test_dialogues_that_are_equal_but_not_the_same_to_the_template():
    """Python's 1 equals True."""
    template = PLAIN.replace("m.content", "('a ' if m.n is sameas true else 'b ') + m.content")
    tokenizer = make_tokenizer(template)
    encode = DialogueEncoder(tokenizer)
    for n, word in ((1, "b"), (True, "a"), (1, "b")):
        turns = [{"role": "user", "content": "hi", "n": n}, {"role": "assistant", "content": "c"}]
        assert words(tokenizer, encode(turns).ids).startswith(f"<s> <user> {word} hi <end>")


def test_templates_that_do_not_show_the_turns_are_refused():
    with pytest.raises(ValueError, match="rejects this dialogue: no system turns"):
        DialogueEncoder(make_tokenizer(STRICT))(TURNS)
    thinks = PLAIN.replace("{{ '<assistant>' }}", "{{ '<assistant> hi' }}")
    with pytest.raises(ValueError, match=r"continues with 'hi' where the dialogue has other text"):
        DialogueEncoder(make_tokenizer(thinks))(TURNS)


def test_a_turn_that_the_template_rewrites_is_learned_in_a_branch(tmp_path):
    """The row equals one row for each learned turn, those before it with weight 0."""
    task, tokenizer = make_task(), make_tokenizer(FORGETS)
    alone = [TURNS[:3], [*TURNS[:2], TURNS[2] | {"weight": 0}, *TURNS[3:]]]
    examples = tokenize(load(tmp_path, [TURNS, *alone], task), task, tokenizer, 100).examples
    texts = examples[0].linear()
    assert [(t.input_ids, t.label_spans) for t in texts] == [
        (example.input_ids, example.label_spans) for example in examples[1:]
    ]
    assert examples[0].num_tokens < sum(text.num_tokens for text in texts)
    assert examples[0].last_target == examples[2].label_spans[0]


def test_merged_turns_keep_their_own_tokens(tmp_path):
    """``assistant`` and the content run together into one word, which generation never sees."""
    joined = PLAIN.replace("'<' + m.role + '> '", "m.role + '-'").replace(
        "<assistant>'", "assistant'"
    )
    tokenizer, task = make_tokenizer(joined), make_task()
    tokenized = tokenize(load(tmp_path, [TURNS[1:3]], task), task, tokenizer, 100)
    (example,) = tokenized.examples
    ((start, stop),) = example.label_spans
    assert list(example.input_ids[:start]) == DialogueEncoder(tokenizer).opening(TURNS[1:2])
    assert words(tokenizer, example.input_ids[start:stop]) == "<unk> <end>"
    (warning,) = tokenized.warnings
    assert "d.jsonl:1: the tokenizer merges the end of a turn with the beginning of" in warning


def test_rows_of_a_file(tmp_path):
    task, tokenizer = make_task(), make_tokenizer()
    rows = load(tmp_path, [TURNS, TURNS[1:3]], task)
    assert rows[0]["messages"] == TURNS
    tokenized = tokenize(rows, task, tokenizer, 100)
    assert learnt(tokenizer, tokenized) == [["c <end>", "e f g <end>"], ["c <end>"]]


def test_a_tokenizer_without_a_template(tmp_path):
    rows = load(tmp_path, [TURNS], make_task())
    with pytest.raises(
        BadInput, match=r"tasks\.t\.messages: the tokenizer .* has no chat template"
    ):
        tokenize(rows, make_task(), make_tokenizer(None), 100)


def test_long_dialogues(tmp_path):
    tokenizer = make_tokenizer()
    rows = load(tmp_path, [TURNS, TURNS[1:3]], make_task())
    with pytest.raises(BadInput, match=r"d\.jsonl:1: has 19 tokens, 14 fit"):
        tokenize(rows, make_task(), tokenizer, 14)
    skipped = tokenize(rows, make_task(too_long="skip"), tokenizer, 14)
    assert ([e.row for e in skipped.examples], skipped.skipped) == ([1], 1)
    cut = tokenize(rows, make_task(too_long="truncate"), tokenizer, 14)
    assert cut.truncated == 1
    assert (
        words(tokenizer, cut.examples[0].input_ids)
        == "<s> <system> sys <end> <user> d <end> <assistant> e f g <end>"
    )
    assert learnt(tokenizer, cut)[0] == ["e f g <end>"]
    with pytest.raises(
        BadInput, match=r"d\.jsonl:1: messages: its last exchange that is learned has 12"
    ):
        tokenize(rows, make_task(too_long="truncate"), tokenizer, 11)


@pytest.mark.parametrize(
    ("dialogue", "expected"),
    [
        ([], "[] is not a list of turns"),
        ("hello", "is not JSON"),
        ([{"role": "user"}], "[0] is {'role': 'user'}; a turn has role and content"),
        (
            [{"role": "asistant", "content": "x"}],
            "[0].role: 'asistant' is not one of system, user, assistant, tool (did you mean",
        ),
        (
            [{"role": "user", "content": 5}],
            "[0].content: 5 must be a string or a list of text parts",
        ),
        ([{"role": "user", "content": " "}], "[0].content: is empty"),
        (TURNS[:2], "the last turn is of the user; end with the assistant's answer"),
        (TURNS[2:3], "[0] is of the assistant; begin with the turn that it answers"),
    ],
)
def test_malformed_dialogues(tmp_path, dialogue, expected):
    with pytest.raises(BadInput) as caught:
        load(tmp_path, [TURNS, dialogue], make_task())
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path}/d.jsonl:2: messages: {expected}")


# Rows that are token ids already


def ids_task(**settings) -> Task:
    return Task(name="t", train="x.jsonl", tokens={}, validation_share=0, **settings)


def load_ids(folder: Path, pairs: list, task: Task) -> RowDataset:
    path = folder / "d.jsonl"
    lines = (json.dumps({"input_ids": ids, "labels": labels}) for ids, labels in pairs)
    path.write_text("\n".join(lines))
    return load_rows(str(path), task)


def test_token_id_rows_are_used_unchanged(tmp_path):
    task = ids_task()
    pairs = [([5, 6, 7, 8], [-100, 6, -100, 8]), ([1, 2], [-100, 2])]
    rows = load_ids(tmp_path, pairs, task)
    assert rows[0] == {"input_ids": pairs[0][0], "labels": pairs[0][1]}
    first, second = tokenize(rows, task, None, 10).examples
    assert (first.input_ids, first.label_spans) == ((5, 6, 7, 8), ((1, 2), (3, 4)))
    assert (second.input_ids, second.label_spans) == ((1, 2), ((1, 2),))


def test_padding_of_token_ids_is_removed(tmp_path):
    path, label = tmp_path / "d.jsonl", [-100, 6]
    padded = [
        {"input_ids": [0, 0, 5, 6], "labels": [-100, -100, *label], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": [5, 6, 0], "labels": [*label, 0], "attention_mask": [True, True, False]},
        {"input_ids": [5, 6], "labels": label, "attention_mask": None},
        {"input_ids": [5, 6], "labels": label},
    ]
    path.write_text("\n".join(map(json.dumps, padded)))
    rows = load_rows(str(path), ids_task())
    assert list(rows) == [{"input_ids": [5, 6], "labels": label}] * 4
    kept = Task(name="t", train="x.jsonl", tokens={"attention_mask": None}, validation_share=0)
    path.write_text(json.dumps(padded[0]))
    assert load_rows(str(path), kept)[0]["input_ids"] == [0, 0, 5, 6]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([1], "has 2 input_ids but an attention_mask of length 1"),
        ([0, 0], "has only padding"),
        ([0, 1], "labels[0] is 6, but no token precedes it"),
        ([1, 2], "attention_mask: [1, 2] is not a list of 0 and 1"),
        ("x", "attention_mask: is not JSON"),
    ],
)
def test_malformed_attention_masks(tmp_path, mask, expected):
    path = tmp_path / "d.jsonl"
    row = {"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": mask}
    path.write_text(json.dumps(row))
    with pytest.raises(BadInput) as caught:
        load_rows(str(path), ids_task())
    assert caught.value.problems[0].startswith(f"{path}:1: {expected}")


@pytest.mark.fault("rows without labels")
def test_token_ids_that_are_too_long(tmp_path):
    pairs = [([5, 6, 7, 8], [-100, 6, 7, 8]), ([1, 2], [-100, 2])]
    rows = load_ids(tmp_path, pairs, ids_task())
    with pytest.raises(BadInput, match=r"d\.jsonl:1: has 4 tokens, 3 fit"):
        tokenize(rows, ids_task(), None, 3)
    assert tokenize(rows, ids_task(too_long="skip"), None, 3).skipped == 1
    cut = tokenize(rows, ids_task(too_long="truncate"), None, 3)
    assert (cut.examples[0].input_ids, cut.examples[0].label_spans) == ((6, 7, 8), ((1, 3),))
    rows = load_ids(tmp_path, [([5, 6, 7, 8], [-100, 6, -100, -100])], ids_task())
    with pytest.raises(BadInput, match="has no label among its last 3 tokens"):
        tokenize(rows, ids_task(too_long="truncate"), None, 3)


@pytest.mark.fault("rows without labels")
@pytest.mark.parametrize(
    ("ids", "labels", "expected"),
    [
        ([1, 2], [-100], "has 2 input_ids but 1 labels"),
        ([1, 2], [1, 2], "labels[0] is 1, but no token precedes it"),
        ([1, 2, 3], [-100, 3, -100], "labels[1] is 3, but input_ids[1] is 2; a label is the id"),
        ([1, 2], [-100, -100], "has no label"),
        ([1, "x"], [-100, 2], "input_ids: [1] is 'x', not a token id"),
        ([1, -2], [-100, -2], "input_ids: [1] is -2, not a token id"),
        ([1, True], [-100, 1], "input_ids: [1] is True, not a token id"),
        ([], [], "input_ids: [] is not a list of token ids"),
    ],
)
def test_malformed_token_ids(tmp_path, ids, labels, expected):
    with pytest.raises(BadInput) as caught:
        load_ids(tmp_path, [(ids, labels)], ids_task())
    assert caught.value.problems[0].startswith(f"{tmp_path}/d.jsonl:1: {expected}")
