"""What is generated from, and how it is scored, for the forms that rows may have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.test_chat import TURNS, make_tokenizer, words
from trainer import evaluation
from trainer.config import RunConfig
from trainer.evaluation import Evaluator
from trainer.memory import StreamBudget
from trainer.tasks.feed import TaskData, load_tasks


def load(folder: Path, rows: list[dict], **task) -> TaskData:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig.model_validate(
        {
            "output_dir": "out",
            "base": {"model": "m"},
            "tasks": [{"name": "t", "train": str(path), "validation": str(path), **task}],
            "prompts": [{"name": "p", "task": "t", "num_virtual_tokens": 2}],
            "training": {"steps": 1},
        }
    )
    return load_tasks(config, make_tokenizer(), 64, 100)["t"]


def score(data: TaskData, monkeypatch, written: list[str]) -> tuple[dict[str, float], list[str]]:
    """The metrics of these texts, and what the base was given to write them."""
    given = []

    def generate(engine, base, tokenizer, inputs, prompt, limit):
        given.extend(words(tokenizer, ids) for ids in inputs)
        return written

    monkeypatch.setattr(evaluation, "generate", generate)
    evaluator = Evaluator(None, None, make_tokenizer(), StreamBudget(64))  # type: ignore[arg-type]
    return evaluator._generated(data.evaluation["validation"], None), given


def test_the_last_answer_of_a_dialogue(tmp_path, monkeypatch):
    rows = [{"messages": TURNS}, {"messages": TURNS[1:3]}]
    data = load(tmp_path, rows, messages="messages", metric="exact_match")
    found, given = score(data, monkeypatch, [" e f g", "d"])
    assert given == [
        "<s> <system> sys <end> <user> a b <end> <assistant> c <end> <user> d <end> <assistant>",
        "<s> <user> a b <end> <assistant>",
    ]
    assert found == {"exact_match": 0.5}
    assert data.counts["validation"]["also_in_train"] == 2
    assert data.sources[1]["also_in_train"][0] == (f"{tmp_path}/rows.jsonl:1",) * 2


@pytest.mark.parametrize("metric", ["f1", "exact_match"])
def test_sets_of_labels(tmp_path, monkeypatch, metric):
    rows = [{"text": "a b", "labels": ["d", "c"]}, {"text": "a", "labels": ["c"]}]
    data = load(
        tmp_path,
        rows,
        input="{text}",
        target=" {labels}",
        choices=["c", "d"],
        multi_label=True,
        label_separator=" , ",
        metric=metric,
    )
    found, given = score(data, monkeypatch, [" d , c", "c , x"])
    assert given == ["a b", "a"]
    expected = {"f1": pytest.approx(2 * 3 / (4 + 3)), "exact_match": 0.5}
    assert found == (expected if metric == "f1" else {"exact_match": 0.5})
