"""Every prompt reads rows in the order of its own data seed, whatever else is in the bank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.unit.test_task_data import write
from tests.unit.test_tokenize import make_tokenizer
from trainer.config import Task
from trainer.data.splits import load_splits, remarks
from trainer.data.task_data import TaskData, load_tasks
from trainer.packing.batch_source import BatchSource


def rows_read(folder: Path, prompts: Sequence[dict[str, Any]], steps: int) -> list[Any]:
    """``[step]``: of each prompt by name the rows it reads, in this order.

    Half way the feed is made anew, from what the first one saved.
    """
    texts = [" ".join("abcde"[i % 5] * (1 + i * 7 % 4)) for i in range(23)]
    training = {"seed": 5, "tokens_per_step": 16}
    config = write(folder, texts, prompts, training)
    tasks = load_tasks(config, make_tokenizer(), 40, 100)
    feed, read = BatchSource(config, tasks), []
    for step in range(steps):
        if step == steps // 2:
            saved, feed = json.loads(json.dumps(feed.state_dict())), BatchSource(config, tasks)
            feed.load_state_dict(saved)
        packed_rows = feed.next_step([True] * len(prompts))
        assert [packed_row.slot for packed_row in packed_rows] == list(range(len(packed_rows)))
        of: dict[str, list[Any]] = {prompt["name"]: [] for prompt in prompts}
        for packed_row in packed_rows:
            assert packed_row.prompt is not None
            of[prompts[packed_row.prompt]["name"]].append(packed_row.example)
        read.append(of)
    return read


def test_one_data_seed_is_one_order_whatever_else_differs(tmp_path):
    """Over some epochs, across a resume, beside prompts of another order, and alone."""
    prompts = [
        {"name": "one", "seed": 1, "data_seed": 3},
        {"name": "other", "seed": 4},
        {"name": "two", "seed": 2, "data_seed": 3, "num_virtual_tokens": 9, "init": "random"},
        {"name": "plain", "seed": 3},
        {"name": "default"},
        {"name": "of_the_run", "seed": 1, "data_seed": 5},
    ]
    together = rows_read(tmp_path, prompts, 20)
    for step in together:
        rows = {name: [e.row for e in examples] for name, examples in step.items()}
        assert rows["one"] == rows["two"] == rows["plain"], "the seed alone is that of the rows"
        assert rows["default"] == rows["of_the_run"]
        assert all(a is b for a, b in zip(step["one"], step["two"], strict=True)), "made once"
    for name in ("other", "default"):
        assert any(step["one"] != step[name] for step in together)
    for prompt in prompts[1:3]:
        alone = rows_read(tmp_path, [prompt], 20)
        assert [step[prompt["name"]] for step in alone] == [s[prompt["name"]] for s in together]


def test_an_update_of_several_epochs_is_noted(tmp_path: Path) -> None:
    """It has the gradient of one epoch, and takes longer."""

    prompts = [{"name": "p", "init": "random", "num_virtual_tokens": 2}]

    def load(tokens_per_step: int) -> TaskData:
        training = {"tokens_per_step": tokens_per_step}
        config = write(tmp_path, ["a b", "c d", "b e"], prompts, training)
        return load_tasks(config, make_tokenizer(), 40, 100)[config.tasks[0].name]

    tokens = int(load(1).train.own_lengths.sum())
    assert load(2 * tokens - 1).notes == []
    (note,) = load(5 * tokens).notes
    assert "each of the 3 train rows 5.0 times" in note
    assert f"training.tokens_per_step={tokens} " in note


def test_a_source_whose_weight_is_less_than_a_row_is_noted(tmp_path: Path) -> None:
    sources = []
    for name, count, weight in (("many", 30, 1.0), ("few", 5, 0.0001)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"text": "{name} {i}", "label": "x"}}\n' for i in range(count)))
        sources.append({"path": str(path), "weight": weight})
    settings: dict[str, Any] = {"input": "{text}", "target": "{label}", "validation_share": 0}
    task = Task.model_validate({"name": "t", "train": sources, **settings})
    lines = remarks(task, load_splits(task))
    assert any(
        "t: train: source 2 of 2 is never read: with weight 0.0001 it has less than one of the 35 "
        "rows" in line
        for line in lines
    ), lines
