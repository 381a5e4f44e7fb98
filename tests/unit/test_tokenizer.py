"""Tokens of a target: those of the joined text, or those that generation reads before it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.unsharded_base import load_unsharded
from tests.one_rank import OneRank
from tests.tokenizers_of_families import BYTE_LEVEL, SENTENCE_PIECE, make_tokenizer
from tests.unit.test_tokenize import EOS, IDS
from tests.unit.test_tokenize import make_tokenizer as make_words
from trainer.config import RunConfig, Task
from trainer.data.splits import load_rows
from trainer.data.task_data import TaskData, load_tasks
from trainer.data.token_cache import cached
from trainer.data.tokenization.tokenize import encode_input, tokenize
from trainer.data.tokenization.tokenizer import TextTokenizer
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.scoring import Request
from trainer.model.tokenizer_class import class_warning
from trainer.packing.activation_memory import TokenBudget
from trainer.runtime.errors import BadInput

ANSWERS = (
    *("billing", "technical", "other", "yes", "no", "fine"),
    *("today", "refund", "update", "screen", "hello", "thanks"),
)
ROWS = [{"q": f"Question {i}: which topic?", "a": answer} for i, answer in enumerate(ANSWERS)]
TEXTS = [f"{row['q']}\nTopic: {row['a']}" for row in ROWS] * 20
ALL = (*SENTENCE_PIECE, *BYTE_LEVEL)

#: Templates whose input and target the tokenizers keep apart.
APART = [
    ("{q}\nTopic:", " {a}"),
    ("{q}\n", "{a}"),
    ("[INST] {q} [/INST]", "{a}"),
    ('{q} "', '{a}"'),
    ("{q} (", "{a})"),
    ("<s>{q}</s>", "{a}"),
    ("{q}\n\n", "{a} {a}\n{a}"),
]


def task_of(source: str, target: str, **settings) -> Task:
    return Task(name="t", train="x.jsonl", input=source, target=target, **settings)


def rows_of(folder: Path, task: Task, rows: list[dict[str, str]] = ROWS):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(str(path), task)


def load(
    folder: Path, tokenizer, source: str, target: str, teacher: str | None = None, **settings
) -> TaskData:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {"name": "t", "train": str(path), "validation": str(path), "input": source}
    taught = {"objective": "distill", "teacher": teacher} if teacher else {}
    config = RunConfig.model_validate(
        {
            "output_dir": "out",
            "base": {"model": "m"},
            "tasks": [task | {"target": target} | settings],
            "prompts": [{"name": "p", "task": "t", "num_virtual_tokens": 2} | taught],
            "training": {"steps": 1},
        }
    )
    return load_tasks(config, tokenizer, 64, len(tokenizer))["t"]


def encoded(tokenizer, text: str) -> list[int]:
    """The ids of transformers; a text that begins with BOS gets no second one."""
    ids = tokenizer(text).input_ids
    return ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: make_tokenizer(kind, TEXTS) for kind in ALL}


@pytest.mark.parametrize(("source", "target"), APART)
@pytest.mark.parametrize("kind", ALL)
def test_a_row_has_the_tokens_of_its_text(tmp_path, tokenizers, kind, source, target):
    tokenizer, task = tokenizers[kind], task_of(source, target, choices=list(ANSWERS))
    scores = tokenize(rows_of(tmp_path, task), task, tokenizer, 100)
    scored = tokenize(rows_of(tmp_path, task), task, tokenizer, 100, per_choice=True).examples
    assert not scores.warnings
    for i, (row, example) in enumerate(zip(ROWS, scores.examples, strict=True)):
        text = source.format(**row)
        assert list(example.input_ids) == [*encoded(tokenizer, text + target.format(**row)), 2]
        own = list(example.input_ids[: example.target_start])
        assert own == encode_input(tokenizer, text) == encoded(tokenizer, text)
        of_row = scored[i * len(ANSWERS) : (i + 1) * len(ANSWERS)]
        assert of_row[i] == example
        assert [list(e.input_ids) for e in of_row] == [
            [*encoded(tokenizer, text + target.format(a=answer)), 2] for answer in ANSWERS
        ]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("source", "target", "remedy"),
    [
        (
            "{q}\nTopic: ",
            "{a}",
            "move the white space between tasks.t.input and target to the beginning",
        ),
        ("{q}\nTopic: bi", "lling", "put a space or a line break between tasks.t.input and target"),
    ],
)
def test_what_merges_keeps_the_tokens_of_the_input(
    tmp_path, tokenizers, kind, source, target, remedy
):
    tokenizer, task = tokenizers[kind], task_of(source, target)
    scores = tokenize(rows_of(tmp_path, task), task, tokenizer, 100)
    for row, example in zip(ROWS, scores.examples, strict=True):
        text, own = source.format(**row), example.input_ids[: example.target_start]
        assert list(own) == encode_input(tokenizer, text)
        assert tokenizer.decode(example.input_ids, skip_special_tokens=True) == (
            text + target.format(**row)
        )
    (warning,) = scores.warnings
    assert warning.startswith(f"{tmp_path}/rows.jsonl:1: the tokenizer merges the end of")
    assert "(in 12 of 12 rows)" in warning
    assert remedy in warning


@pytest.mark.parametrize("kind", ALL)
def test_many_texts_have_the_tokens_that_each_has_alone(tokenizers, kind):
    """Also where the tokenizer's file asks for texts that are cut or padded."""
    texts = [*TEXTS[:12], "", " ", "Topic: </s> é\n\n", "[/INST]1234567 yes"]
    tokenizer = copy.deepcopy(tokenizers[kind])
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    assert TextTokenizer(tokenizer).inputs(texts) == [tokenizers[kind](t).input_ids for t in texts]


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_rows_are_input_and_target_apart(tmp_path, tokenizers, kind):
    """There a text has the same tokens wherever it stands."""
    tokenizer = tokenizers[kind]
    for source, target in (("{q}\nTopic:", " {a}"), ("{q}\nTopic: ", "{a}")):
        task = task_of(source, target)
        for row, example in zip(
            ROWS, tokenize(rows_of(tmp_path, task), task, tokenizer, 100).examples, strict=True
        ):
            target_ids = tokenizer(target.format(**row), add_special_tokens=False).input_ids
            assert list(example.input_ids[example.target_start : -1]) == target_ids


def test_rows_that_merge_are_counted_in_workers_and_in_the_cache(tmp_path, tokenizers, monkeypatch):
    monkeypatch.setenv("PROMPTSHARD_CACHE", str(tmp_path / "cache"))
    task = task_of("{q}", "{a}")
    rows = [{"q": f"Question {i}:", "a": " yes"} for i in range(5000)]
    rows[4321] = {"q": "Question: ", "a": "yes"}
    for _ in range(2):
        scores = tokenize(rows_of(tmp_path, task, rows), task, tokenizers["gpt2"], 100)
        (warning,) = scores.warnings
        assert "rows.jsonl:4322: " in warning
        assert "(in 1 of 5,000 rows)" in warning


def test_token_tables_of_older_rules_are_not_read(tmp_path, monkeypatch):
    """Of rules that tokenized input and target apart."""
    from trainer.data import token_cache

    monkeypatch.setenv("PROMPTSHARD_CACHE", str(tmp_path))
    made = []

    def make():
        made.append(token_cache.RULES)
        return []

    for rules in (1, token_cache.RULES, token_cache.RULES):
        monkeypatch.setattr(token_cache, "RULES", rules)
        cached({}, make, dict)
    assert len(made) == 2


def test_truncation_keeps_the_prefix_and_the_tokens_of_the_target(tmp_path, tokenizers):
    for kind in ALL:
        tokenizer, task = tokenizers[kind], task_of("{q}\n", "{a}", too_long="truncate")
        rows = rows_of(tmp_path, task)
        for prefix in ("", "Topic: ", "Topic:\n"):
            full = tokenize(rows, task, tokenizer, 100, prefix=prefix).examples
            cut = tokenize(rows, task, tokenizer, full[0].num_tokens - 2, prefix=prefix).examples
            text = prefix + ROWS[0]["q"] + "\n"
            assert list(full[0].input_ids) == [*tokenizer(text + "billing").input_ids, 2]
            ids = full[0].input_ids
            fronts = [tuple(tokenizer(part).input_ids) for part in (prefix, prefix.rstrip())]
            front = next(len(own) for own in fronts if ids[: len(own)] == own)
            assert cut[0].input_ids == ids[:front] + ids[front + 2 :]


def test_choices_that_are_the_same_behind_an_input(tmp_path, tokenizers):
    tokenizer = make_tokenizer("prepend", TEXTS)
    task = task_of("{q}\nTopic:", "{a}", choices=["billing", " billing"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [tokenizer.backend_tokenizer.normalizer, normalizers.Replace(":▁", ":")]
    )
    rows = rows_of(tmp_path, task, [{"q": "Which?", "a": "billing"}])
    with pytest.raises(BadInput, match="'billing' and ' billing' give the same tokens: this base"):
        tokenize(rows, task, tokenizer, 100, per_choice=True)
    rows = rows_of(
        tmp_path,
        task_of("{q}", "{a}", choices=task.choices),
        [{"q": "Which?", "a": "billing"}, {"q": "Which:", "a": "billing"}],
    )
    with pytest.raises(BadInput, match=r"rows\.jsonl:2: after its input 'billing' and ' billing'"):
        tokenize(rows, task_of("{q}", "{a}", choices=task.choices), tokenizer, 100, per_choice=True)


@pytest.mark.parametrize("source", ["{q}\nTopic:", "billing {q}", "1 {q}", "é {q}"])
@pytest.mark.parametrize("teacher", ["Which topic?\n", "Topic ("])
@pytest.mark.parametrize("kind", ALL)
def test_rows_after_a_teacher_have_the_tokens_of_one_text(
    tmp_path, tokenizers, kind, teacher, source
):
    data = load(tmp_path, tokenizers[kind], source, " {a}", teacher=teacher)
    ids = data.teachers["p"].token_ids
    behind = data.teachers["p"].continued_by(data.train[0])
    text = source.format(**ROWS[0])
    assert data.warnings == []
    assert [*ids, *behind.input_ids] == [
        *tokenizers[kind](teacher + text + " billing").input_ids,
        2,
    ]
    ((start, stop),) = behind.label_spans
    assert tokenizers[kind].decode(behind.input_ids[start:stop]).strip() == "billing</s>"


def test_a_teacher_that_merges_with_the_rows_is_warned_of(tmp_path, tokenizers):
    for kind in ALL:
        data = load(tmp_path, tokenizers[kind], "billing {q}", " {a}", teacher="Which topic? ")
        assert data.warnings == [
            "prompts.p.teacher: the tokenizer merges it with the text of the rows around it; they "
            "are tokenized separately: end both with a word or a line break, without a space"
        ]


def test_an_unknown_word_does_not_swallow_the_target(tmp_path):
    tokenizer, task = make_words(), task_of("{q}", "{a}")
    rows = [{"q": "a zz", "a": "yy"}, {"q": "a zz", "a": " yes"}, {"q": "a", "a": " zz"}]
    scores = tokenize(rows_of(tmp_path, task, rows), task, tokenizer, 100)
    assert [list(e.input_ids[e.target_start :]) for e in scores.examples] == [
        [tokenizer.unk_token_id, EOS],
        [IDS["yes"], EOS],
        [tokenizer.unk_token_id, EOS],
    ]
    (warning,) = scores.warnings
    assert "(in 1 of 3 rows)" in warning


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By tokenizer and text: a base that knows what follows each question, as one text."""

    def train(kind: str, source: str, target: str) -> Path:
        folder = tmp_path_factory.mktemp("base")
        tokenizer = make_tokenizer(kind, TEXTS)
        texts = [source.format(**row) + target.format(**row) for row in ROWS]
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = LlamaForCausalLM(config)
        rows = [[*tokenizer(text).input_ids, 2] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [2] * (longest - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(120):
            model(ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return train


@pytest.mark.parametrize(
    ("kind", "source", "target"),
    [
        ("llama", "{q}\n", "{a}"),
        ("llama", "[INST] {q} [/INST]", "{a}"),
        ("prepend", "{q}\nTopic:", " {a}"),
        ("first", '{q} "', "{a}"),
        ("gpt2", "{q}\nTopic:", " {a}"),
    ],
)
def test_a_base_that_memorized_every_answer_scores_1(tmp_path, bases, kind, source, target):
    folder = bases(kind, source, target)
    tokenizer = make_tokenizer(kind, TEXTS)
    base = load_unsharded(folder, "none")
    for metric in ("accuracy", "exact_match"):
        choices = {"choices": list(ANSWERS)} if metric == "accuracy" else {"max_new_tokens": 16}
        data = load(tmp_path, tokenizer, source, target, metric=metric, **choices)
        evaluator = Evaluator(OneRank(), base, tokenizer, TokenBudget(2000))
        (scores,) = evaluator.score([Request(data.evaluation["validation"], None)], [])
        assert scores.scores[metric] == 1.0
        assert scores.scores["loss"] < 0.02


# BOS, padding and rows without a token


@pytest.mark.parametrize("kind", ["llama", "prepend", "llama3"])
def test_bos_occurs_once_behind_a_template_that_writes_it(tmp_path, tokenizers, kind):
    tokenizer = tokenizers[kind]
    task = Task(name="t", train="x", input="<s>Q: {q}\nA:", target=" {a}")
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"q": "two cats", "a": "yes"}) + "\n")
    (example,) = tokenize(load_rows(str(path), task), task, tokenizer, 100).examples
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert (
        list(example.input_ids[: example.target_start])
        == tokenizer("<s>Q: two cats\nA:", add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize("kind", ALL)
def test_padding_of_a_tokenizer_adds_no_tokens(tmp_path, kind):
    """Padding on the left that tokenizer.json turns on; and no padding token at all."""
    tokenizer = make_tokenizer(kind, TEXTS)
    plain = TextTokenizer(tokenizer).inputs(["two cats", "a"])
    tokenizer.backend_tokenizer.enable_padding(direction="left", length=40)
    tokenizer.save_pretrained(tmp_path)
    padded = AutoTokenizer.from_pretrained(tmp_path)
    padded.padding_side = "left"
    assert TextTokenizer(padded).inputs(["two cats", "a"]) == plain
    padded.pad_token = None
    assert TextTokenizer(padded).inputs(["two cats", "a"]) == plain


def test_a_class_that_disagrees_with_its_file_is_warned_of(tmp_path):
    tokenizer = make_tokenizer("llama3", ["12345 of 2024 Hello, world!"] * 9)
    tokenizer.save_pretrained(tmp_path)
    assert class_warning(AutoTokenizer.from_pretrained(tmp_path), tmp_path) is None
    assert class_warning(tokenizer, tmp_path / "none") is None
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Digits", "individual_digits": True}
    )
    path.write_text(json.dumps(content))
    warning = class_warning(tokenizer, tmp_path)
    assert warning is not None
    assert re.search(r"class TokenizersBackend reads .* as 123 45 .* as 1 2 3 4 5", warning)
