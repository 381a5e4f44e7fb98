"""Which rows a split takes: by content alone, counted exactly, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trainer.config import Task
from trainer.data.dataset import RowDataset
from trainer.data.row_hashing import find_leaks, first_by_hash, split_by_hash
from trainer.data.splits import leaks, load_splits
from trainer.runtime.errors import BadInput


def jsonl(folder: Path, name: str, texts: list[str]) -> str:
    lines = (json.dumps({"text": text, "label": "x"}) for text in texts)
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def task(train, **settings) -> Task:
    return Task(name="t", train=train, input="{text}", target="{label}", **settings)


def texts(rows: RowDataset) -> list[str]:
    return [row["text"] for row in rows]


def hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)


WORDS = [f"row {i}" for i in range(2000)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_split_takes_its_share_and_loses_nothing(share):
    kept, held = split_by_hash(hashes(20_000), share)
    assert sorted([*kept, *held]) == list(range(20_000))
    assert len(held) == pytest.approx(20_000 * share, abs=300)


@pytest.mark.parametrize("count", [1, 699, 700, 701, 4999, 5000])
def test_the_first_by_hash_are_counted_exactly_also_among_equal_rows(count):
    values = hashes(5000) % np.uint64(50)  # many equal ones
    chosen = first_by_hash(values, count)
    assert len(set(chosen)) == count
    assert sorted(chosen) == list(chosen)
    more = first_by_hash(values, min(5000, count + 100))
    assert set(chosen) <= set(more)
    complete = {v for v in set(values) if (values[chosen] == v).sum() == (values == v).sum()}
    assert len(set(values[chosen]) - complete) <= 1  # only the last value is cut
    for value in set(values[chosen]) - complete:
        cut = (values[chosen] == value).sum()
        assert list(chosen[values[chosen] == value]) == list(np.flatnonzero(values == value)[:cut])


def test_most_rows_and_validation_are_chosen_independently():
    values = hashes(20_000)
    first = set(first_by_hash(values, 2000).tolist())
    held = set(split_by_hash(values, 0.1)[1].tolist())
    assert len(first & held) == pytest.approx(200, abs=60)


def test_rows_for_validation_where_none_are_named(tmp_path):
    path = jsonl(tmp_path, "a.jsonl", WORDS)
    splits = load_splits(task(path, validation_share=0.25))
    train, held = texts(splits["train"]), texts(splits["validation"])
    assert sorted(train + held) == sorted(WORDS)
    assert len(held) == pytest.approx(500, abs=80)
    assert splits["validation"].where(0) == f"{path}:{WORDS.index(held[0]) + 1}"
    assert splits["validation"][0]["text"] == held[0]
    assert splits["train"][-1]["text"] == train[-1]
    assert len(load_splits(task(path))["validation"]) == pytest.approx(200, abs=50)
    assert list(load_splits(task(path, validation_share=0))) == ["train"]


def test_new_rows_and_another_order_keep_the_split_of_old_rows(tmp_path):
    before = load_splits(task(jsonl(tmp_path, "a.jsonl", WORDS)))
    more = [*reversed(WORDS), *(f"new {i}" for i in range(500))]
    after = load_splits(task(jsonl(tmp_path, "b.jsonl", more)))
    assert set(texts(before["validation"])) < set(texts(after["validation"]))
    assert set(texts(before["train"])) < set(texts(after["train"]))


def test_equal_rows_stay_on_one_side(tmp_path):
    splits = load_splits(task(jsonl(tmp_path, "a.jsonl", WORDS[:300] * 3)))
    train, held = texts(splits["train"]), texts(splits["validation"])
    assert not set(train) & set(held)
    assert len(train) + len(held) == 900
    assert leaks(task("a.jsonl"), splits) == []


def test_too_few_rows_to_keep_some(tmp_path):
    path = jsonl(tmp_path, "a.jsonl", ["one", "two"])
    with pytest.raises(BadInput, match=r"tasks\.t\.validation_share: 0\.001 of 2 rows leaves none"):
        load_splits(task(path, validation_share=0.001))


def test_most_rows_of_splits_and_sources(tmp_path):
    one, two = jsonl(tmp_path, "a.jsonl", WORDS), jsonl(tmp_path, "b.jsonl", ["b"] * 50)
    run = task([{"path": one, "max_rows": 300}, {"path": two, "max_rows": 20}], validation_share=0)
    rows = load_splits(run)["train"]
    assert [(source.start, source.stop) for source in rows.components] == [(0, 300), (300, 320)]
    assert texts(rows)[300:] == ["b"] * 20
    assert rows.where(300) == f"{two}:1"
    fewer = load_splits(run.model_copy(update={"max_rows": 100}))["train"]
    assert len(fewer) == 100
    assert set(texts(fewer)) <= set(texts(rows))
    # Not the head of the file:
    assert max(int(text.split()[1]) for text in texts(fewer) if text != "b") > 1000
    held = load_splits(task(one, validation=two, max_validation_rows=7))
    assert [len(rows) for rows in held.values()] == [2000, 7]


def test_sources_with_weights(tmp_path):
    one, two = jsonl(tmp_path, "a.jsonl", WORDS), jsonl(tmp_path, "b.jsonl", ["b"] * 50)
    train = [{"path": one, "weight": 3}, {"path": two, "weight": 1}]
    splits = load_splits(task(train))
    first, second = splits["train"].components
    assert (first.weight, second.weight) == (3, 1)
    assert (first.start, first.stop) == (0, second.start)
    assert second.stop == len(splits["train"])
    assert set(texts(splits["train"])[second.start :]) <= {"b"}
    plain = load_splits(task([one, two]))["train"]
    assert [source.weight for source in plain.components] == [None, None]
    others = [splits["train"].digest, plain.digest, load_splits(task(one))["train"].digest]
    assert len(set(others)) == 3


def test_the_digest_identifies_the_selected_rows(tmp_path):
    path = jsonl(tmp_path, "a.jsonl", WORDS)
    runs = [
        task(path, validation_share=0),
        task(path, validation_share=0.1),
        task(path, validation_share=0.2),
        task(path, validation_share=0, max_rows=10),
        task({"path": path, "max_rows": 10}, validation_share=0),
    ]
    assert len({load_splits(run)["train"].digest for run in runs}) == len(runs)
    renamed = jsonl(tmp_path, "b.jsonl", WORDS)
    assert len({load_splits(task(p))["validation"].digest for p in (path, renamed)}) == 1


# The leak check


def test_leaks_are_counted_and_named(tmp_path):
    train = jsonl(tmp_path, "a.jsonl", [*WORDS, "row 7"])
    valid = jsonl(
        tmp_path, "v.jsonl", ["new", "row 7", "other", "row 9", "row 7", "row 1", "row 2"]
    )
    run = task(train, validation=valid, shifted_validation=jsonl(tmp_path, "s.jsonl", ["none"]))
    (leak,) = leaks(run, load_splits(run))
    assert (leak.split, leak.count, leak.total) == ("validation", 5, 7)
    assert leak.rows == (
        (f"{valid}:2", f"{train}:8"),
        (f"{valid}:4", f"{train}:10"),
        (f"{valid}:5", f"{train}:8"),
    )
    assert leak.warning.startswith("task t: 5 of 7 rows of validation are also in train: ")


def test_rows_of_other_formats_are_the_same_rows(tmp_path):
    train = jsonl(tmp_path, "a.jsonl", ["1", "2"])
    (tmp_path / "v.csv").write_text("label,id,text\nx,9,2\ny,9,1\n")
    run = task(train, validation=str(tmp_path / "v.csv"))
    (leak,) = leaks(run, load_splits(run))
    assert leak.rows == ((f"{tmp_path}/v.csv: row 1 (line 2)", f"{train}:2"),)


def test_leaks_of_many_rows_equal_a_plain_search():
    train, held = hashes(9000) % np.uint64(5000), hashes(3000, seed=1) % np.uint64(9000)
    count, rows = find_leaks(train, held)
    first = {}
    for i, value in enumerate(train.tolist()):
        first.setdefault(value, i)
    expected = [(i, first[v]) for i, v in enumerate(held.tolist()) if v in first]
    assert count == len(expected) > 1000
    assert rows == expected[: len(rows)]
