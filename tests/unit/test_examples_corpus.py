"""The example data are what their generator writes, with no leak; the tiny base is what it says."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from examples import corpus, programs
from examples.make_tiny_base import ROWS, TASKS, write_data

EXAMPLES = Path(corpus.__file__).parent
BASE = EXAMPLES / "tiny_base"
MEGABYTE = 1_000_000


def rows_of(task: str, split: str) -> list[dict[str, Any]]:
    lines = (EXAMPLES / "data" / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_data_files_are_the_generators_bytes(tmp_path: Path) -> None:
    write_data(tmp_path, seed=0)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in (EXAMPLES / "data").iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "data" / name).read_bytes(), name


@pytest.mark.parametrize("task", TASKS)
def test_no_text_is_in_two_splits(task: str) -> None:
    texts = [row["text"] for split in ROWS for row in rows_of(task, split)]
    assert len(texts) == sum(ROWS.values())
    assert len(set(texts)) == len(texts)


def test_pretraining_never_sees_a_row() -> None:
    held_out = {row["text"] for task in TASKS for split in ROWS for row in rows_of(task, split)}
    code = {row["code"] for split in ROWS for row in rows_of("codegen", split)}
    for document in itertools.islice(corpus.documents(seed=0), 20_000):
        assert document.text not in held_out
        assert document.answer not in code


@pytest.mark.parametrize("task", sorted(corpus.SCENES))
@pytest.mark.parametrize("split", sorted(ROWS))
def test_labels_are_balanced(task: str, split: str) -> None:
    counts = Counter(row["label"] for row in rows_of(task, split))
    assert sorted(counts) == sorted(corpus.SCENES[task].labels)
    assert len(set(counts.values())) == 1


@pytest.mark.parametrize("scene", corpus.SCENES.values(), ids=lambda scene: scene.task)
def test_the_text_does_not_say_which_label_is_wanted(scene: corpus.Scene) -> None:
    """A row mentions a word of every aspect, each of another label, and no label itself."""
    for row in rows_of(scene.task, "valid"):
        words = row["text"].lower().replace(".", " ").replace(",", " ").split()
        facts = {
            name: next(label for label, known in aspect.words.items() if set(known) & set(words))
            for name, aspect in scene.aspects.items()
        }
        assert sorted(facts.values()) == sorted(scene.labels)
        assert facts[scene.wanted] == row["label"]
        assert not set(scene.labels) & set(words)


@pytest.mark.parametrize("split", sorted(ROWS))
def test_code_passes_its_tests(split: str) -> None:
    for row in rows_of("codegen", split):
        scope: dict[str, Any] = {}
        exec(row["code"], scope)
        for case in row["tests"]:
            assert scope["f"](*case["args"]) == case["result"], row


def test_splits_hold_contents_apart() -> None:
    train = {row["code"] for row in rows_of("codegen", "train")}
    valid = {row["code"] for row in rows_of("codegen", "valid")}
    assert not train & valid
    assert {corpus.split_of(f"content {n}") for n in range(200)} == set(corpus.SPLITS)


def test_operations_agree_with_their_python() -> None:
    for name, operation in programs.OPERATIONS.items():
        for argument in programs.EXAMPLES[operation.kind]:
            expression = operation.python.format(v="x", n=3)
            assert eval(expression, {"x": argument}) == operation.run(argument, 3), name


def test_tokenizer_round_trip() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = [row["text"] for task in TASKS for row in rows_of(task, "valid")]
    for text in [*texts, "Größe: 12.5 µm\n\tend  ", "def f(x): return x[::-1]", "中文 🙂"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for scene in corpus.SCENES.values():
        for label in scene.labels:
            assert len(tokenizer(f" {label}")["input_ids"]) == 1


def test_base_is_small_and_loads_as_stored() -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 8 * MEGABYTE
    stored = load_file(BASE / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(BASE)
    assert model.config.model_type == "llama"
    loaded = dict(model.named_parameters())
    assert sorted(loaded) == sorted(stored)
    for name, weight in stored.items():
        assert loaded[name].dtype == weight.dtype
        assert torch.equal(loaded[name], weight), name
