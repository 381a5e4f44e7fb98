"""Tasks on their way from files to what a step reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_tokenize import ids, make_tokenizer
from trainer.config import RunConfig
from trainer.data.task_data import TaskData, load_tasks
from trainer.runtime.errors import BadInput

LONG = "a b c d e a b"


def load(folder: Path, texts: list[str], context: int, **settings: Any) -> TaskData:
    """Task ``t`` with these texts as rows of train and validation; 4 virtual tokens."""
    return load_tasks(write(folder, texts, **settings), make_tokenizer(), context, 100)["t"]


def write(
    folder: Path,
    texts: list[str],
    prompts: Sequence[dict[str, Any]] = ({"name": "p"},),
    training: dict[str, Any] | None = None,
    **settings: Any,
) -> RunConfig:
    """A run of these prompts of the task; ``settings`` are the task's."""
    lines = [json.dumps({"text": text, "label": "yes"}) + "\n" for text in texts]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(lines))
    task = {
        "name": "t",
        "input": "{text}",
        "target": "{label}",
        "train": str(folder / "train.jsonl"),
        "validation": str(folder / "validation.jsonl"),
        **settings,
    }
    return RunConfig.model_validate(
        {
            "output_dir": str(folder / "run"),
            "base": {"model": "base"},
            "tasks": [task],
            "prompts": [{"task": "t", "num_virtual_tokens": 4, **prompt} for prompt in prompts],
            "training": {"steps": 1, **(training or {})},
        }
    )


def rows_of(data: TaskData) -> list[list[int]]:
    sets = [data.evaluation["validation"], *data.hand_written["validation"]]
    return [[candidates[0].row for candidates in eval_set.candidates] for eval_set in sets]


def test_a_hard_prompt_replaces_the_virtual_tokens(tmp_path):
    """10 tokens of context less 4 virtual ones: rows of 6 fit, with 4 hard ones in front too."""
    data = load(tmp_path, ["a b c"], 10, hand_written=["d e d e "])
    (hard,) = data.hand_written["validation"]
    assert hard.candidates[0][0].input_ids == ids("<s> d e d e a b c yes </s>")
    assert rows_of(data) == [[0], [0]]


def test_a_hard_prompt_that_makes_rows_too_long_is_named(tmp_path):
    with pytest.raises(BadInput) as caught:
        load(tmp_path, ["a b c"], 10, hand_written=["d ", "d e d e d "])
    assert caught.value.problems == [
        f"{tmp_path}/validation.jsonl:1: has 11 tokens, 10 fit with tasks.t.hand_written "
        "'d e d e d ' before it; shorten it, or set tasks.t.too_long to skip or truncate"
    ]


@pytest.mark.parametrize("choices", [None, ["yes", "no no"]])
def test_all_prompts_are_compared_on_the_same_rows(tmp_path, choices):
    texts = ["a b", LONG, "a", "a b c"]
    data = load(
        tmp_path, texts, 10, too_long="skip", hand_written=["d e d e d ", "d "], choices=choices
    )
    width, fits = (2, [2]) if choices else (1, [0, 2])
    assert rows_of(data) == [fits] * 3
    assert data.counts["train"] == {"rows": 4, "skipped": 1, "truncated": 0}
    held = {"rows": 4, "skipped": 4 - len(fits), "truncated": 0, "also_in_train": 4}
    assert data.counts["validation"] == held
    for rows in (data.evaluation["validation"], *data.hand_written["validation"]):
        assert rows.gold == [0] * len(fits)
        assert sum(rows.label_counts) == 2 * len(fits)
        assert {len(candidates) for candidates in rows.candidates} == {width}


def test_no_row_that_all_prompts_can_be_compared_on(tmp_path):
    with pytest.raises(BadInput, match="hand_written 'd d d d d d d d ' before it: too_long: skip"):
        load(tmp_path, ["a"], 11, too_long="skip", hand_written=["d d d d d d d d "])


def test_a_cut_row_keeps_as_much_text_behind_any_prompt(tmp_path):
    data = load(tmp_path, [LONG], 9, too_long="truncate", hand_written=["d ", "d e d e "])
    assert data.evaluation["validation"].candidates[0][0].input_ids == ids("<s> a b yes </s>")
    one, four = (rows.candidates[0][0].input_ids for rows in data.hand_written["validation"])
    assert one == ids("<s> d a b yes </s>")
    assert four == ids("<s> d e d e a b yes </s>")


def test_validation_is_tokenised_once_per_prompt(tmp_path, monkeypatch):
    read = []

    def counted(rows: Any, *arguments: Any, prefix: str = "", **options: Any) -> Any:
        read.append((Path(rows.path).stem, prefix))
        return real(rows, *arguments, prefix=prefix, **options)

    from trainer.data import task_data

    real = task_data.tokenize
    monkeypatch.setattr(task_data, "tokenize", counted)
    load(tmp_path, ["a"], 20, hand_written=["d "])
    prefixes = [prefix for name, prefix in read if name == "validation"]
    assert prefixes == ["", "d "]
    assert ("train", "") in read
