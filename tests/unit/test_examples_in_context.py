"""Examples in context, their retrieval, and changes of rows that keep the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.test_chat import make_tokenizer, words
from trainer.config import Task
from trainer.data.dataset import RowDataset
from trainer.data.examples_in_context import fixed_examples, with_examples
from trainer.data.perturbations import lower_case, no_punctuation, templates, typos
from trainer.data.retrieval import retrieve
from trainer.data.splits import load_rows
from trainer.data.tokenization.tokenize import tokenize


def task(**settings: Any) -> Task:
    values = {"name": "t", "train": "x.jsonl", "input": "{text}", "target": " {label}"}
    return Task.model_validate(values | settings)


def dataset(folder: Path, settings: Task, rows: list[dict[str, Any]]) -> RowDataset:
    path = folder / f"{len(list(folder.iterdir()))}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(str(path), settings)


def read(rows: RowDataset, settings: Task, **options: Any) -> list[str]:
    tokenizer = make_tokenizer()
    table = tokenize(rows, settings, tokenizer, 200, **options).examples
    return [words(tokenizer, example.input_ids) for example in table]


FIRST = np.array([0])
ROWS = [{"text": "a b", "label": "c"}, {"text": "d e", "label": "f"}, {"text": "g", "label": "a"}]


def test_examples_precede_a_text_or_follow_its_prompt(tmp_path: Path) -> None:
    for template, text, place in (
        ("{text}", "d e f g a a b c", 0),
        ("d {text}", "d d e f d g a d a b c", 0),
        ("d {virtual_tokens}{text}", "d d d e f d g a a b c", 1),
        ("{text} {virtual_tokens}d", "d e d f g d a a b d c", 9),
    ):
        settings = task(input=template, append_eos=False)
        rows = dataset(tmp_path, settings, ROWS)
        shown = with_examples(rows.take(FIRST, "first"), rows, [[1, 2]])
        assert read(shown, settings) == [text]
        (example,) = tokenize(shown, settings, make_tokenizer(), 200).examples
        assert example.prompt_at == place


def test_examples_are_turns_of_a_dialogue_after_the_system(tmp_path: Path) -> None:
    settings = task(chat=True, target="{label}", system="sys")
    rows = dataset(tmp_path, settings, ROWS)
    shown = with_examples(rows.take(FIRST, "first"), rows, [[1]])
    text = "<s> <system> sys <end> <user> d e <end> <assistant> f <end> <user> a b <end>"
    assert read(shown, settings)[0].startswith(f"{text} <assistant> c <end>")
    table = tokenize(shown, settings, make_tokenizer(), 200).examples
    assert len(table[0].label_spans) == 1, "only the answer of the row is learned"


def test_examples_of_rows_with_messages(tmp_path: Path) -> None:
    settings = Task.model_validate({"name": "t", "train": "x.jsonl", "messages": "m"})
    turns = [
        [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        for user, answer in (("a", "b"), ("d", "e"))
    ]
    rows = dataset(tmp_path, settings, [{"m": dialogue} for dialogue in turns])
    shown = with_examples(rows.take(FIRST, "first"), rows, [[1]])
    (text,) = read(shown, settings)
    assert text.startswith("<s> <user> d <end> <assistant> e <end> <user> a <end> <assistant> b")


def test_fixed_examples_have_every_class(tmp_path: Path) -> None:
    settings = task(choices=["c", "f"], metric="accuracy")
    rows = [{"text": str(i), "label": "c" if i < 30 else "f"} for i in range(32)]
    train = dataset(tmp_path, settings, rows)
    drawn = fixed_examples(settings, train, 4, seed=1)
    assert sorted(rows[i]["label"] for i in drawn) == ["c", "c", "f", "f"]
    assert drawn == fixed_examples(settings, train, 4, seed=1)
    assert drawn != fixed_examples(settings, train, 4, seed=2)
    others = fixed_examples(settings, train, 32, seed=1, answered=train.take(FIRST, "first"))
    assert sorted(others) == list(range(1, 32))
    assert len(set(fixed_examples(settings, train, 6, seed=1))) == 6, "only two rows are f"


def test_the_most_similar_rows_are_retrieved_and_equal_rows_left_out(tmp_path: Path) -> None:
    settings = task()
    texts = ["the red bird sings", "a red bird", "blue whale song", "the red bird sings", "x"]
    train = dataset(tmp_path, settings, [{"text": t, "label": "a"} for t in texts])
    queries = [{"text": "the red bird sings", "label": "b"}, {"text": "blue whale", "label": "a"}]
    rows = dataset(tmp_path, settings, queries)
    chosen = retrieve(settings, train, rows, 2)
    assert chosen[0][-1] == 1, "rows 0 and 3 have the same text as the query"
    assert not {0, 3} & set(chosen[0])
    assert chosen[1][-1] == 2
    assert retrieve(settings, train, dataset(tmp_path, settings, [{"text": "?", "label": "a"}]), 1)


def test_rows_without_spaces_between_words_are_retrieved_by_their_characters(
    tmp_path: Path,
) -> None:
    settings = task()
    texts = ["今日は天気がいい", "映画はとても面白かった", "この料理はおいしくない"]
    train = dataset(tmp_path, settings, [{"text": t, "label": "a"} for t in texts])
    queries = [{"text": t, "label": "a"} for t in ("昨日の映画は面白い", "料理がおいしい")]
    chosen = retrieve(settings, train, dataset(tmp_path, settings, queries), 1)
    assert chosen == [[1], [2]]


def test_rows_without_a_common_word_do_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    settings = task()
    rows = [{"text": f"word{i}", "label": "ab"[i >= 50]} for i in range(100)]
    query = dataset(tmp_path, settings, [{"text": "other", "label": "a"}])
    shown = []
    for order in (rows, rows[::-1]):
        (chosen,) = retrieve(settings, dataset(tmp_path, settings, order), query, 8)
        shown.append([order[i] for i in chosen])
    assert shown[0] == shown[1]
    assert {row["label"] for row in shown[0]} == {"a", "b"}


def test_changes_of_texts() -> None:
    text = "It's 3.5 km, isn't it? (Yes.) A well-known distance"
    assert lower_case(text) == text.lower()
    assert no_punctuation(text) == "It's 3.5 km isn't it Yes A well-known distance"
    assert no_punctuation("?!") == "?!", "the base would have nothing to read"
    changed = typos("the quick brown foxes jumped over lazy sleeping animals " * 5)
    assert changed == typos("the quick brown foxes jumped over lazy sleeping animals " * 5)
    before = ("the quick brown foxes jumped over lazy sleeping animals " * 5).split()
    pairs = [(a, b) for a, b in zip(before, changed.split(), strict=True) if a != b]
    assert 1 <= len(pairs) <= 20
    for word, typo in pairs:
        assert sorted(word) == sorted(typo)
        assert (word[0], word[-1]) == (typo[0], typo[-1])


def test_other_templates() -> None:
    two = task(input="Rules.\nA: {a}\nB: {b}\nAnswer:", paraphrases=["{b} / {a} ="])
    changed = templates(two)
    assert {name: other.input for name, other in changed.items()} == {
        "input_order": "Rules.\nB: {b}\nA: {a}\nAnswer:",
        "paraphrase-1": "{b} / {a} =",
    }
    assert templates(task()) == {}
    assert templates(task(input="{a}\n{virtual_tokens}{b}")) == {}


@pytest.mark.parametrize("text", ["{other}", "no field", "{virtual_tokens}{text}"])
def test_a_paraphrase_with_other_fields(text: str) -> None:
    with pytest.raises(ValueError, match=r"paraphrases: .* must have the fields of input"):
        task(paraphrases=[text])
