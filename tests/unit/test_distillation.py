"""The sliced divergence against torch's over all logits; rows of teachers; refused settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from tests.thread_ranks import on_all_ranks
from tests.unit.test_lm_head import (
    KINDS,
    H,
    N,
    V,
    make_head,
    problem,
    slice_by,
    whole_logits,
)
from tests.unit.test_shared_head import block
from trainer.config import load
from trainer.data.teacher import Teacher
from trainer.data.token_table import Example
from trainer.model.layers.lm_head import FrozenHead, LabelLosses
from trainer.model.layers.vocab_parallel import VocabBlock
from trainer.packing.packed_batch import build_packed_batch, build_teacher_batch
from trainer.packing.packed_row import PackedRow
from trainer.runtime.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]

DISTILLED_D = torch.tensor([0, 3, 4, 10, 36])
TEACHER_DH = torch.randn(5, H, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("columns", [64, 333, V])
@pytest.mark.parametrize("kind", KINDS)
def test_slices_equal_the_full_vocabulary(
    kind: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five positions learn from a teacher, the others from their label."""
    slice_by(monkeypatch, columns)
    layer, (hidden_NH, labels_N, weight_N) = make_head(**KINDS[kind]), problem()
    ours, exact = hidden_NH.clone().requires_grad_(), hidden_NH.double().requires_grad_()
    losses: LabelLosses = layer(ours, labels_N, TEACHER_DH, DISTILLED_D)
    (losses.loss_N * weight_N).sum().backward()

    student, teacher = whole_logits(layer, exact), whole_logits(layer, TEACHER_DH.double())
    rest = torch.ones(N).index_fill(0, DISTILLED_D, 0).nonzero()[:, 0]
    wanted_N = torch.zeros(N, dtype=torch.float64)
    wanted_N = wanted_N.index_copy(
        0, rest, cross_entropy(student[rest], labels_N[rest], reduction="none")
    )
    logs = student[DISTILLED_D].log_softmax(1), teacher.log_softmax(1)
    kl_D = kl_div(*logs, reduction="none", log_target=True).sum(1)
    wanted_N = wanted_N.index_copy(0, DISTILLED_D, kl_D)
    (wanted_N * weight_N).sum().backward()
    torch.testing.assert_close(losses.loss_N.double(), wanted_N, rtol=5e-6, atol=3e-6)
    assert ours.grad is not None
    assert exact.grad is not None
    assert (ours.grad - exact.grad).abs().max() / exact.grad.abs().max() < 1e-6
    same = (student[DISTILLED_D].argmax(1) == teacher.argmax(1)).float()
    assert losses.agrees_N is not None
    assert torch.equal(losses.agrees_N[DISTILLED_D], same)
    assert not losses.agrees_N[rest].any()


def test_a_student_equal_to_its_teacher_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, where the difference of two sums over probabilities would be rounding."""
    slice_by(monkeypatch, 64)
    layer, teacher_DH = make_head(), TEACHER_DH.bfloat16()
    ours, every = teacher_DH.clone().requires_grad_(), torch.arange(5)
    losses = layer(ours, every, teacher_DH, every)
    losses.loss_N.sum().backward()
    assert losses.loss_N.tolist() == [0.0] * 5
    assert losses.agrees_N.tolist() == [1.0] * 5
    assert ours.grad is not None
    assert not ours.grad.any()


def test_products_are_at_most_one_slice_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any vocabulary size."""
    slice_by(monkeypatch, 50)
    layer, widths = make_head(), set[int]()
    project = VocabBlock.project

    def watched(block: VocabBlock, x: Tensor, start: int, stop: int) -> Tensor:
        widths.add(stop - start)
        return project(block, x, start, stop)

    monkeypatch.setattr(VocabBlock, "project", watched)
    hidden_NH, labels_N, _ = problem()
    layer(hidden_NH, labels_N, TEACHER_DH, DISTILLED_D)
    assert widths == {50}


#: (label positions, distilled ones of them) of each rank: some, all, none.
SHARES = {"few": [(9, 4), (3, 3), (5, 0)], "many": [(300, 300), (2, 0), (1, 1)]}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("kind", ["capped", "biased", "int8"])
def test_a_shared_head_gives_the_same(
    kind: str, shares: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states travel to its blocks where they are few; ranks without any stay in step."""
    slice_by(monkeypatch, 100)

    def loss_and_gradient(layer: FrozenHead, rank: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(rank)
        count, distilled = shares[rank]
        hidden_NH = torch.randn(count, H, generator=draw).requires_grad_()
        labels_N = torch.randint(V, (count,), generator=draw)
        teacher_DH = torch.randn(distilled, H, generator=draw)
        places_D = torch.randperm(count, generator=draw)[:distilled]
        losses = layer(hidden_NH, labels_N, teacher_DH, places_D)
        (losses.loss_N * torch.arange(1.0, count + 1)).sum().backward()
        assert hidden_NH.grad is not None
        return torch.stack(losses).detach(), hidden_NH.grad

    every, post = on_all_ranks(3, lambda rank: loss_and_gradient(block(kind, rank), rank.rank))
    # One for labels, which are few; two for the teacher, unless the table is gathered instead.
    assert post.calls.count("maximum") == (3 if shares[0][0] < 10 else 1)
    for rank, (losses, grad_NH) in enumerate(every):
        wanted, wanted_NH = loss_and_gradient(make_head(**KINDS[kind]), rank)
        torch.testing.assert_close(losses, wanted, rtol=5e-6, atol=5e-6)
        torch.testing.assert_close(grad_NH, wanted_NH, rtol=1e-5, atol=1e-4)


def test_rows_follow_their_teachers_text() -> None:
    one, other = Teacher(0, (1, 20, 21, 22), 1), Teacher(1, (1, 30), 1)
    rows = [Example.with_target((1, *range(5 + i, 10 + i)), 4, i) for i in range(3)]
    packed_rows = [
        PackedRow(rows[0], 0, 0, teacher=other),
        PackedRow(rows[1], 1, 1),
        PackedRow(rows[2], 0, 2),
    ]
    packed_rows[2] = PackedRow(rows[2], 0, 2, teacher=one)
    batch, distilled = build_packed_batch(packed_rows, [2, 3]), build_teacher_batch(packed_rows)
    assert batch.distilled_D is not None
    assert batch.distilled_D.tolist() == [0, 1, 4, 5]
    # Each teacher is included once, in the order of indices; rows lose their special token.
    assert [segment.length for segment in distilled.segments] == [4, 2, 5, 5]
    assert distilled.token_ids_T.tolist() == [0] * 6 + [5, 6, 7, 8, 9] + [7, 8, 9, 10, 11]
    assert distilled.labels_N.tolist() == batch.labels_N[batch.distilled_D].tolist()
    assert distilled.position_ids_T[6:].tolist() == [2, 3, 4, 5, 6, 4, 5, 6, 7, 8]
    alone = build_teacher_batch(packed_rows[1:2])
    assert alone.label_slot_N.tolist() == [-1, -1]
    none = build_packed_batch(packed_rows[1:2], [2, 3]).distilled_D
    assert none is not None
    assert none.tolist() == []


def example_with(tmp_path: Path, **prompt: Any) -> Path:
    run = yaml.safe_load((ROOT / "examples" / "distill.yaml").read_text())
    run["prompts"][0] |= prompt
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**run, "output_dir": str(tmp_path / "run")}))
    return path


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["prompts.short.teacher=null"], "prompts[0].teacher: is missing; set the text"),
        (
            ["prompts.short.objective=labels"],
            "prompts[0].teacher: objective: labels does not use it",
        ),
        (
            ["prompts.short.objective=labels", "prompts.short.teacher=null"],
            "tasks[0].target: is missing; add it, or use objective: distill for short",
        ),
        (["tasks.notes.metric=exact_match"], "tasks[0].metric: 'exact_match' needs a target"),
        (
            ["tasks.notes.input=''", "tasks.notes.tokens={}"],
            "tasks[0].tokens: objective: distill needs text; use input or messages",
        ),
    ],
)
def test_invalid_input_is_refused(tmp_path: Path, overrides: list[str], problem: str) -> None:
    with pytest.raises(BadInput, match=re.escape(problem)):
        load(example_with(tmp_path), overrides)


def test_rows_need_no_label(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from trainer.data.task_data import load_tasks

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_base")
    for split in ("train", "valid"):
        text = '{"text": "Ms Reed came in with angina."}\n{"text": "Works at night."}\n'
        (tmp_path / f"{split}.jsonl").write_text(text)
    files = [
        f"tasks.notes.{k}={tmp_path / v}"
        for k, v in (("train", "train.jsonl"), ("validation", "valid.jsonl"))
    ]
    config = load(example_with(tmp_path), [*files, "tasks.notes.shifted_validation=null"])
    data = load_tasks(config, tokenizer, 512, 1024)["notes"]
    example = data.train[0]
    assert tokenizer.decode(example.input_ids) == "Ms Reed came in with angina.\nAnswer:<eos>"
    assert example.label_spans == ((1, example.num_tokens),)
    teacher = data.teachers["short"]
    assert tokenizer.decode(list(teacher.token_ids)) == config.prompts[0].teacher
    assert 300 <= teacher.num_tokens < 320
    with pytest.raises(BadInput, match="a teacher of 311 tokens leaves no room"):
        load_tasks(config, tokenizer, 312, 1024)
    with pytest.raises(BadInput, match="has 14 tokens, 9 fit"):
        load_tasks(config, tokenizer, 320, 1024)
