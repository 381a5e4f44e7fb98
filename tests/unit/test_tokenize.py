"""Rows as tokens: what stands where, what is cut, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trainer.config import Task
from trainer.data.dataset import RowDataset, gold_choices
from trainer.data.splits import load_rows
from trainer.data.token_table import Example, TokenBlock, in_memory
from trainer.data.tokenization.tokenize import (
    check_vocabulary,
    encode_input,
    tokenize,
)
from trainer.packing.packed_batch import build_packed_batch
from trainer.packing.packed_row import PackedRow
from trainer.runtime.errors import BadInput

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "d", "e", "Answer", ":", "yes", "no", "maybe"]
IDS = {word: i for i, word in enumerate(WORDS)}
BOS, EOS = IDS["<s>"], IDS["</s>"]


def make_tokenizer(template: str | None = "<s> $A", eos: str | None = "</s>") -> Any:
    """Words at white space and punctuation, with special tokens as a template puts them."""
    inner = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        specials = [("<s>", BOS), ("</s>", EOS)]
        inner.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=specials
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=eos,
        model_max_length=8,
    )


def make_task(**settings: Any) -> Task:
    values = {"input": "{text}\nAnswer:", "target": " {label}", "train": "x.jsonl", **settings}
    return Task(name="t", **values)


def make_rows(folder: Path, pairs: list[tuple[str, str]], task: Task) -> RowDataset:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in pairs))
    return load_rows(str(path), task)


def ids(text: str) -> tuple[int, ...]:
    return tuple(IDS[word] for word in text.split())


def test_a_row_is_input_target_and_eos(tmp_path):
    task = make_task()
    rows = make_rows(tmp_path, [("a b", "yes"), ("c", "no maybe")], task)
    tokenized = tokenize(rows, task, make_tokenizer(), 100)
    assert list(tokenized.examples) == [
        Example.with_target(ids("<s> a b Answer : yes </s>"), 5, 0),
        Example.with_target(ids("<s> c Answer : no maybe </s>"), 4, 1),
    ]
    assert [(e.num_tokens, e.num_labels) for e in tokenized.examples] == [(7, 2), (7, 3)]
    assert (tokenized.skipped, tokenized.truncated) == (0, 0)


def test_without_eos(tmp_path):
    task = make_task(append_eos=False)
    rows = make_rows(tmp_path, [("a", "yes")], task)
    tokenizer = make_tokenizer(eos=None)
    assert tokenize(rows, task, tokenizer, 100).examples[0].input_ids == ids("<s> a Answer : yes")
    with pytest.raises(BadInput, match=r"tasks\.t\.append_eos: true, but the tokenizer has no EOS"):
        tokenize(rows, make_task(), tokenizer, 100)


@pytest.mark.parametrize(
    ("template", "front"),
    [("<s> $A </s>", "<s>"), ("$A </s>", ""), (None, ""), ("<s> <s> $A", "<s> <s>")],
)
def test_special_tokens_stay_first_and_never_separate_input_and_target(tmp_path, template, front):
    task = make_task()
    rows = make_rows(tmp_path, [("a </s>", "yes")], task)
    tokenizer = make_tokenizer(template)
    (example,) = tokenize(rows, task, tokenizer, 100).examples
    assert example.input_ids == ids(f"{front} a </s> Answer : yes </s>")
    assert tuple(encode_input(tokenizer, "a b")) == ids(f"{front} a b")
    cut = tokenize(rows, make_task(too_long="truncate"), tokenizer, 5 + len(front.split()))
    assert cut.examples[0].input_ids == ids(f"{front} </s> Answer : yes </s>")


def test_prefix_is_joined_as_text(tmp_path):
    task = make_task()
    rows = make_rows(tmp_path, [("b", "yes")], task)
    (example,) = tokenize(rows, task, make_tokenizer(), 100, prefix="c d\n").examples
    assert example == Example.with_target(ids("<s> c d b Answer : yes </s>"), 6, 0)


@pytest.mark.fault("prompt and text exceed the context length")
def test_too_long_refuse_names_rows(tmp_path):
    """Rows with the same problem are one line; of different problems the first ten are named."""
    task = make_task()
    rows = make_rows(tmp_path, [("a", "yes"), *[("a b c d e", "yes")] * 12], task)
    with pytest.raises(BadInput) as caught:
        tokenize(rows, task, make_tokenizer(), 8)
    assert caught.value.problems == [
        f"{tmp_path}/d.jsonl:2 and 11 more rows: has 10 tokens, 8 fit (context minus virtual "
        "tokens); shorten it, or set tasks.t.too_long to skip or truncate"
    ]
    rows = make_rows(tmp_path, [("a " * (i + 5), "yes") for i in range(12)], task)
    with pytest.raises(BadInput) as caught:
        tokenize(rows, task, make_tokenizer(), 8)
    assert len(caught.value.problems) == 11
    assert caught.value.problems[-1].endswith("d.jsonl: and 2 more")


@pytest.mark.fault("prompt and text exceed the context length")
def test_too_long_skip_counts_and_keeps_row_numbers(tmp_path):
    task = make_task(too_long="skip", choices=["yes", "no"])
    rows = make_rows(tmp_path, [("a b c d e", "yes"), ("a", "no"), ("a b c", "yes")], task)
    tokenized = tokenize(rows, task, make_tokenizer(), 8)
    assert ([e.row for e in tokenized.examples], tokenized.skipped, tokenized.truncated) == (
        [1, 2],
        1,
        0,
    )
    scored = tokenize(rows, task, make_tokenizer(), 8, per_choice=True)
    assert [e.row for e in scored.examples] == [1, 1, 2, 2]
    assert scored.skipped == 1
    assert gold_choices(rows, task) == [0, 1, 0]
    with pytest.raises(BadInput, match="all 3 rows are longer than 4 tokens"):
        tokenize(rows, task, make_tokenizer(), 4)


@pytest.mark.fault("prompt and text exceed the context length")
def test_truncate_cuts_the_input_from_the_left_and_keeps_bos_and_prefix(tmp_path):
    task = make_task(too_long="truncate")
    rows = make_rows(tmp_path, [("a b c d e", "yes"), ("a", "no")], task)
    tokenized = tokenize(rows, task, make_tokenizer(), 8)
    assert tokenized.examples[0] == Example.with_target(ids("<s> c d e Answer : yes </s>"), 6, 0)
    assert (tokenized.skipped, tokenized.truncated) == (0, 1)
    prefixed = tokenize(rows, task, make_tokenizer(), 8, prefix="maybe ")
    assert prefixed.examples[0] == Example.with_target(ids("<s> maybe d e Answer : yes </s>"), 6, 0)


def test_a_target_is_never_cut(tmp_path):
    task = make_task(too_long="truncate")
    rows = make_rows(tmp_path, [("a", "yes"), ("a", "no " * 9)], task)
    with pytest.raises(BadInput, match=r"d\.jsonl:2: its target alone has 10 tokens; 8 fit"):
        tokenize(rows, task, make_tokenizer(), 8)


def test_all_choices_of_a_row_follow_the_same_input(tmp_path):
    task = make_task(too_long="truncate", choices=["yes", "no maybe"])
    rows = make_rows(tmp_path, [("a b c d e", "yes"), ("a", "no maybe")], task)
    examples = tokenize(rows, task, make_tokenizer(), 8, per_choice=True).examples
    long, short = examples[:2], examples[2:]
    assert [e.input_ids for e in long] == [
        ids("<s> d e Answer : yes </s>"),
        ids("<s> d e Answer : no maybe </s>"),
    ]
    assert [e.input_ids for e in short] == [
        ids("<s> a Answer : yes </s>"),
        ids("<s> a Answer : no maybe </s>"),
    ]
    assert {e.target_start for e in long} == {5}
    assert gold_choices(rows, task) == [0, 1]


def test_choices_with_equal_tokens_are_refused(tmp_path):
    task = make_task(choices=["yes", "metabolic", "cardiac"])
    rows = make_rows(tmp_path, [("a", "yes")], task)
    with pytest.raises(BadInput, match="'metabolic' and 'cardiac' give the same tokens"):
        tokenize(rows, task, make_tokenizer(), 100, per_choice=True)


def test_texts_without_tokens(tmp_path):
    task = make_task(input="{text}", append_eos=False)
    rows = make_rows(tmp_path, [("a", "yes")], task)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("yes", "")
    with pytest.raises(BadInput, match=r"d\.jsonl:1: its target gives no tokens"):
        tokenize(rows, task, tokenizer, 100)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    with pytest.raises(BadInput, match=r"d\.jsonl:1: its input gives no tokens"):
        tokenize(rows, task, tokenizer, 100)


@pytest.mark.fault("prompt and text exceed the context length")
def test_no_room_for_text(tmp_path):
    task = make_task()
    rows = make_rows(tmp_path, [("a", "yes")], task)
    with pytest.raises(BadInput, match="use fewer virtual tokens"):
        tokenize(rows, task, make_tokenizer(), -3)


@pytest.mark.fault("tokenizer of another base")
def test_check_vocabulary(tmp_path):
    check_vocabulary(in_memory([TokenBlock.of([Example.with_target((1, 2, 9), 1, 0)])]), 10)
    rows = [Example.with_target((1, 2), 1, 0), Example.with_target((1, 10), 1, 3)]
    table = in_memory([TokenBlock.of(rows)])
    with pytest.raises(BadInput, match="row 4 has the id 10, but the base embeds 10"):
        check_vocabulary(table, 10)


def test_long_texts_give_no_warning(tmp_path, capfd):
    task = make_task()
    rows = make_rows(tmp_path, [("a " * 50, "yes")], task)
    tokenize(rows, task, make_tokenizer(), 100)
    assert capfd.readouterr().err == ""


def test_labels_may_form_several_spans():
    two = Example((7, 8, 9, 10, 11), ((1, 2), (3, 5)), 0)
    batch = build_packed_batch(
        [PackedRow(Example.with_target((1, 2), 1, 0), None, 0), PackedRow(two, 0, 1)], [3]
    )
    assert two.num_labels == 3
    assert two.target_start == 1
    # [prompt 0..2 | row of two tokens 3..4 | row of five tokens 5..9]
    assert batch.label_positions_N.tolist() == [3, 5, 7, 8]
    assert batch.labels_N.tolist() == [2, 8, 10, 11]
    assert batch.label_slot_N.tolist() == [0, 1, 1, 1]
