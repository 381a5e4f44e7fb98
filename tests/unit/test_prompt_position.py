"""``{virtual_tokens}`` in an input template: tokens, packing, decoding, distillation, export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.unsharded_base import load_unsharded
from tests.family_bases import plain_model, problem, save_family, with_text_around
from tests.soft_prompts import soft_prompts
from tests.tokenizers_of_families import make_tokenizer as tokenizer_like
from tests.unit.test_tokenize import ids, make_rows, make_task, make_tokenizer
from trainer.config import Prompt
from trainer.data.teacher import merge_warnings, teachers_of
from trainer.data.token_table import Example, TokenBlock, TokenTable, in_memory
from trainer.data.tokenization.tokenize import encode_halves, tokenize
from trainer.model.attention.prefix_cache import PastCache
from trainer.model.decode_step import DecodeStep
from trainer.packing.packed_batch import build_packed_batch, build_teacher_batch
from trainer.packing.packed_row import PackedRow
from trainer.packing.planning import plan_batches
from trainer.prompts.peft_adapter import (
    CARD,
    FixedText,
    load_peft,
    read_fixed_text,
    save_peft,
)
from trainer.prompts.saved_prompts import SEGMENT, find_source
from trainer.prompts.soft_prompt import VirtualTokens
from trainer.runtime.errors import BadInput

INPUT = "c d {virtual_tokens} e : {text}\nAnswer:"


def table(folder: Path, pairs: list[tuple[str, str]], length: int = 100, **settings: Any) -> Any:
    task = make_task(**{"input": INPUT, **settings})
    return tokenize(make_rows(folder, pairs, task), task, make_tokenizer(), length).examples


def test_the_text_around_the_virtual_tokens_is_tokenized_separately(tmp_path: Path) -> None:
    rows = table(tmp_path, [("a b", "yes"), ("c", "no")])
    assert list(rows) == [
        Example(ids("<s> c d e : a b Answer : yes </s>"), ((9, 11),), 0, 3, 5),
        Example(ids("<s> c d e : c Answer : no </s>"), ((8, 10),), 1, 3, 5),
    ]
    assert rows.leading == Example(ids("<s> c d e :"), (), -1, 3, 5)
    assert rows.own_lengths.tolist() == [6, 5]
    assert encode_halves(make_tokenizer(), "c d ", " e : a") == (list(ids("<s> c d e : a")), 3)


def test_virtual_tokens_after_a_column(tmp_path: Path) -> None:
    rows = table(tmp_path, [("a b", "yes"), ("c", "no")], input="{text}{virtual_tokens}")
    assert list(rows) == [
        Example(ids("<s> a b yes </s>"), ((3, 5),), 0, 3, 3),
        Example(ids("<s> c no </s>"), ((2, 4),), 1, 2, 2),
    ]
    assert rows.leading is None
    assert rows.own_lengths.tolist() == [5, 4]


def test_truncation_keeps_the_text_around_the_virtual_tokens(tmp_path: Path) -> None:
    rows = table(tmp_path, [("a b c d", "yes")], 10, too_long="truncate")
    assert list(rows) == [Example(ids("<s> c d e : d Answer : yes </s>"), ((8, 10),), 0, 3, 5)]
    after = table(
        tmp_path, [("a b c", "yes")], 5, input="{text}{virtual_tokens}", too_long="truncate"
    )
    assert list(after) == [Example(ids("<s> b c yes </s>"), ((3, 5),), 0, 3, 3)]


def test_a_hand_written_prompt_replaces_the_virtual_tokens(tmp_path: Path) -> None:
    task = make_task(input=INPUT)
    rows = make_rows(tmp_path, [("a", "yes")], task)
    (example,) = tokenize(rows, task, make_tokenizer(), 100, prefix="b b").examples
    assert example == Example(ids("<s> c d b b e : a Answer : yes </s>"), ((10, 12),), 0)


def test_the_fixed_text_of_all_rows_ends_where_one_differs(tmp_path: Path) -> None:
    rows = list(table(tmp_path, [("a b", "yes"), ("c", "no")]))
    assert in_memory([TokenBlock.of(rows)]).leading == Example(ids("<s> c d e :"), (), -1, 3, 5)
    shorter = replace(rows[1], prompt_end=4)
    assert in_memory([TokenBlock.of([rows[0], shorter])]).leading == Example(
        ids("<s> c d e"), (), -1, 3, 4
    )
    other = replace(rows[1], input_ids=(*ids("<s> d"), *rows[1].input_ids[2:]))
    assert in_memory([TokenBlock.of([rows[0], other])]).leading is None


@pytest.mark.parametrize("template", ["{text}{virtual_tokens}", "{text} {virtual_tokens} a"])
def test_without_a_target_tokens_follow_the_virtual_tokens(tmp_path: Path, template: str) -> None:
    for too_long in ("refuse", "truncate"):
        with pytest.raises(BadInput, match="less than two tokens after the virtual tokens"):
            table(
                tmp_path,
                [("a b c d", "")],
                5,
                target="",
                input=template,
                append_eos=False,
                too_long=too_long,
            )


def test_without_a_target_the_row_itself_is_learned(tmp_path: Path) -> None:
    (row,) = table(tmp_path, [("a b", "")], target="")
    assert row == Example(ids("<s> c d e : a b Answer : </s>"), ((6, 10),), 0, 3, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": "{virtual_tokens}{text}{virtual_tokens}"}, "more than once"),
        ({"target": "{virtual_tokens}{label}"}, "works in input only"),
        ({"input": "{virtual_tokens} a"}, "no {column} field"),
        ({"hand_written": ["b {virtual_tokens}"]}, "is inserted at {virtual_tokens} of input"),
        ({"chat": True, "system": "b {virtual_tokens}"}, "use prompts.position: system"),
    ],
)
def test_templates_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(**settings)


def test_the_text_is_once_in_a_packed_batch(tmp_path: Path) -> None:
    rows: TokenTable = table(tmp_path, [("a b", "yes"), ("c", "no"), ("d e", "no")])
    packed_rows = [PackedRow(row, 0, i) for i, row in enumerate(rows)]
    batch = build_packed_batch(packed_rows, [4])
    assert len(batch.token_ids_T) == 5 + 4 + sum(rows.own_lengths)
    assert batch.token_ids_T[:9].tolist() == [*ids("<s> c d"), 0, 0, 0, 0, *ids("e :")]
    assert [(k, s.start, s.length) for k, s in batch.prompts] == [(0, 3, 4)]
    (plan,) = plan_batches(packed_rows, [4], 1, len(batch.token_ids_T))
    assert len(plan) == 1


def test_shared_text_does_not_change_losses_or_gradients(tmp_path: Path) -> None:
    """Keys and values before shared text: the same as a copy of the text in every row."""
    save_family(tmp_path / "base", "llama")
    base = load_unsharded(tmp_path / "base", "none")
    packed_rows, _ = problem(base.hidden_size)
    config = base.model.config
    shape = (4, config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
    past = [torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    rows = with_text_around(packed_rows)
    copied = [
        PackedRow(Example(r.example.input_ids, r.example.label_spans, i), r.prompt, i)
        for i, r in enumerate(rows)
    ]
    results = []
    for some in (rows, copied):
        leaves = [tensor.clone().requires_grad_() for tensor in past]
        batch = build_packed_batch(some, [0, 0], [4, 4])
        loss_N = base(batch, soft_prompts(leaves)).losses.loss_N
        results.append((loss_N, torch.autograd.grad(loss_N.sum(), leaves), batch))
    (shared, gradients, small), (alone, wanted, large) = results
    assert len(small.token_ids_T) < len(large.token_ids_T)
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)


def test_decoding_equals_plain(tmp_path: Path) -> None:
    save_family(tmp_path / "base", "llama")
    base, model = load_unsharded(tmp_path / "base", "none"), plain_model(tmp_path / "base", "none")
    packed_rows, prompts = problem(base.hidden_size)
    rows, places = [list(row.example.input_ids) for row in packed_rows[:2]], [2, 5]
    longest, prompt = max(map(len, rows)), prompts[1]
    pads = [longest - len(row) for row in rows]
    ids_BL = torch.tensor([[0] * pad + row for pad, row in zip(pads, rows, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest + len(prompt) - pad) for pad in pads])
    with torch.no_grad(), base.unpacked():
        step = DecodeStep(ids_BL, mask, PastCache(), places)
        logits_BV = base(step, [VirtualTokens(prompt)]).logits_BV
        for logits_V, row, at in zip(logits_BV, rows, places, strict=True):
            words = model.get_input_embeddings()(torch.tensor([row]))
            embeds = torch.cat([words[:, :at], prompt[None], words[:, at:]], dim=1)
            wanted_V = model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits_V, wanted_V, rtol=1e-4, atol=1e-4)


def test_the_teacher_is_read_at_the_same_place(tmp_path: Path) -> None:
    task = make_task(input=INPUT)
    prompt = Prompt(name="p", task="t", objective="distill", teacher="b b", num_virtual_tokens=4)
    config: Any = SimpleNamespace(prompts=[prompt], task=lambda name: task)
    teacher = teachers_of(config, make_tokenizer())["p"]
    assert teacher.token_ids == ids("b b")
    (row,) = table(tmp_path, [("a", "yes")])
    batch = build_teacher_batch([PackedRow(row, 0, 0, teacher=teacher)])
    read = [*ids("<s> c d"), 0, 0, *ids("e : a Answer : yes </s>")]
    assert batch.token_ids_T.tolist() == read
    assert batch.prompts[0][1].start == 3
    assert batch.labels_N.tolist() == list(ids("yes </s>"))


TEXTS = ["rate the review: good or bad", "classify a review. now answer it"]


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama"])
@pytest.mark.parametrize(
    "template",
    [
        "rate {virtual_tokens}\nreview: {text}",
        "{virtual_tokens}review: {text}",
        "{virtual_tokens}{text}",
    ],
)
def test_a_teacher_is_tokenized_with_the_fixed_text_before_it(
    tmp_path: Path, kind: str, template: str
) -> None:
    """A space before ``{virtual_tokens}`` belongs to the teacher's first word, as in one text."""
    task, tokenizer = make_task(input=template), tokenizer_like(kind, TEXTS)
    rows = make_rows(tmp_path, [("good", "a"), ("a bad review", "b")], task)
    text = "classify a review.\n"
    prompt = Prompt(name="p", task="t", objective="distill", teacher=text, num_virtual_tokens=4)
    config: Any = SimpleNamespace(prompts=[prompt], task=lambda name: task)
    teacher = teachers_of(config, tokenizer)["p"]
    taught = tokenize(rows, task, tokenizer, 100, prefix=text).examples
    for row, wanted in zip(tokenize(rows, task, tokenizer, 100).examples, taught, strict=True):
        after = teacher.continued_by(row)
        ids, at = after.input_ids, after.prompt_at
        assert (*ids[:at], *teacher.token_ids, *ids[at:]) == wanted.input_ids
        assert after.num_labels == wanted.num_labels
        fixed = [ids[at : after.prompt_end], row.input_ids[row.prompt_at : row.prompt_end]]
        assert len({tokenizer.decode(part).strip() for part in fixed}) == 1
    assert merge_warnings(task, [prompt], tokenizer, rows[0]) == []


def test_a_teacher_that_merges_with_text_of_the_rows_is_reported(tmp_path: Path) -> None:
    task, tokenizer = make_task(input="{text} {virtual_tokens} a"), tokenizer_like("gpt2", TEXTS)
    (row,) = make_rows(tmp_path, [("good", "a")], task)
    prompt = Prompt(name="p", task="t", objective="distill", teacher="now", num_virtual_tokens=4)
    (warning,) = merge_warnings(task, [prompt], tokenizer, row)
    assert warning.startswith("prompts.p.teacher: the tokenizer merges it with the text")


def test_an_exported_prompt_contains_the_text_around_it(tmp_path: Path) -> None:
    """PEFT on the text of the row alone gives the loss of the packed batch."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    rows = table(tmp_path, [("a b", "yes"), ("c", "no")])
    base = load_unsharded(tmp_path / "base", "none")
    prompt_PH = torch.randn(4, 16)
    batch = build_packed_batch([PackedRow(row, 0, i) for i, row in enumerate(rows)], [4])
    loss_N: Tensor = base(batch, [VirtualTokens(prompt_PH)]).losses.loss_N
    with torch.no_grad():
        words_nH = base(torch.tensor(rows.leading.input_ids), []).embeddings_TH
    fixed = FixedText(rows.leading.input_ids, 3, words_nH, ("<s> c d", "e :"))
    adapter = tmp_path / "adapter"
    save_peft(
        *(adapter, VirtualTokens(prompt_PH), str(tmp_path / "base")),
        num_layers=2,
        num_attention_heads=4,
        fixed_text=fixed,
    )
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(plain, adapter).eval()
    for i, row in enumerate(rows):
        own = torch.tensor([row.input_ids[5:]])
        start = row.target_start - 5
        logits = model(input_ids=own).logits[0, -own.shape[1] :]
        wanted = cross_entropy(logits[start - 1 : -1], own[0, start:], reduction="none")
        torch.testing.assert_close(loss_N[batch.label_slot_N == i], wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(load_peft(adapter).tensor, prompt_PH)
    again = read_fixed_text(adapter, make_tokenizer())
    assert again is not None
    assert (again.ids, again.at) == (fixed.ids, fixed.at)
    assert torch.equal(again.embeddings, fixed.embeddings)
    assert find_source(str(adapter)).num_virtual_tokens == 4
    assert 'include the text "<s> c d" before the trained ones' in (adapter / CARD).read_text()
    (adapter / SEGMENT).write_text('{"before": [1], "num_virtual_tokens": 4, "after": []}')
    with pytest.raises(BadInput, match=r"segment\.json: is damaged"):
        find_source(str(adapter))


def test_the_card_of_a_prompt_inside_the_rows_inserts_it_there(tmp_path: Path) -> None:
    """The code of the model card gives the loss of the packed batch."""
    save_family(tmp_path / "base", "llama")
    base, model = load_unsharded(tmp_path / "base", "none"), plain_model(tmp_path / "base", "none")
    prompt_PH, row = torch.randn(4, base.hidden_size), (3, 5, 6, 2, 7)
    batch = build_packed_batch([PackedRow(Example(row, ((4, 5),), 0, 2, 2), 0, 0)], [4])
    loss_N: Tensor = base(batch, [VirtualTokens(prompt_PH)]).losses.loss_N
    adapter = tmp_path / "adapter"
    save_peft(
        *(adapter, VirtualTokens(prompt_PH), str(tmp_path / "base")),
        num_layers=model.config.num_hidden_layers,
        num_attention_heads=model.config.num_attention_heads,
        inside=True,
    )
    card = (adapter / CARD).read_text()
    code = card.split("```python\n")[-1].split("base.generate")[0]
    names = {"torch": torch, "base": model, "place": 2, "input_ids": torch.tensor([row])}
    names["model"] = PeftModel.from_pretrained(model, adapter)
    exec(code, names)
    logits = model(inputs_embeds=names["embeds"], use_cache=False).logits[0, -2:-1]
    torch.testing.assert_close(loss_N, cross_entropy(logits, torch.tensor(row[-1:]))[None])
