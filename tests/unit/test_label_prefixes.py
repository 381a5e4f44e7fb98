"""Choices of which one begins another: the longer one is predicted where the base continues."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.one_rank import OneRank
from tests.unit.test_chat import make_tokenizer
from tests.unit.test_evaluation import load
from trainer.data.label_prefixes import continuations, exclusive
from trainer.data.token_table import Example
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.scoring import Request, Scored
from trainer.model.layers.lm_head import LabelLosses
from trainer.model.prompted_model import ForwardResult
from trainer.packing.activation_memory import TokenBudget
from trainer.packing.packed_batch import PackedBatch

CHOICES = ["c", "c d", "c d e", "f"]
TASK = {"input": "{text}", "target": " {label}", "choices": CHOICES, "metric": "accuracy"}
#: What follows each text, and then something that is neither a choice nor an end.
ANSWERS = {"a": "c", "b": "c d", "d": "c d e", "e": "f"}


class Knows:
    """A base that continues every text with its answer: each next token has probability 0.9."""

    def __init__(self, tokenizer: Any, packed: bool) -> None:
        self.packed = packed
        self._tokenizer = tokenizer

    def __call__(self, batch: PackedBatch, _: Any) -> ForwardResult:
        labels = zip(batch.label_positions_N.tolist(), batch.labels_N.tolist(), strict=True)
        losses = torch.tensor([self._nll(batch, place, label) for place, label in labels])
        return ForwardResult(LabelLosses(losses))

    def _nll(self, batch: PackedBatch, place: int, label: int) -> float:
        segment = next(s for s in batch.segments if 0 <= place - s.start < s.length)
        ids: list[int] = []
        for prefix in segment.prefixes:
            ids += batch.token_ids_T[prefix.start : prefix.start + prefix.length].tolist()
        ids += batch.token_ids_T[segment.start : place + 1].tolist()
        text, *written = self._tokenizer.convert_ids_to_tokens(ids)
        answer = [*ANSWERS[text].split(), "hi", "hi", "hi"]
        likely = self._tokenizer.convert_tokens_to_ids(answer[len(written)])
        return -math.log(0.9 if label == likely else 0.1 / (len(self._tokenizer) - 1))


def score(folder: Path, packed: bool, **task: Any) -> tuple[Scored, list[str]]:
    tokenizer = make_tokenizer()
    rows = [{"text": text, "label": answer} for text, answer in ANSWERS.items()]
    data = load(folder, rows, tokenizer, **TASK, **task)
    base: Any = Knows(tokenizer, packed)
    evaluator = Evaluator(OneRank(), base, tokenizer, TokenBudget(64))  # type: ignore[arg-type]
    (scored,) = evaluator.score([Request(data.evaluation["validation"], None)], [])
    return scored, data.remarks


@pytest.mark.parametrize("packed", [True, False])
def test_a_base_that_memorized_all_answers_has_accuracy_1(tmp_path: Path, packed: bool) -> None:
    scored, remarks = score(tmp_path, packed, append_eos=False)
    assert scored.scores["accuracy"] == 1.0
    assert scored.predicted == [0, 1, 2, 3]
    # The loss is that of the labels, as in training.
    assert scored.scores["loss"] == pytest.approx(-math.log(0.9))
    wanted = [("'c'", "'c d'"), ("'c d'", "'c d e'")]
    assert len(remarks) == 2
    for remark, (short, longer) in zip(remarks, wanted, strict=True):
        assert f"choices: {short} begins {longer} and append_eos is false" in remark


def test_nothing_changes_where_eos_ends_the_choices(tmp_path: Path) -> None:
    scored, remarks = score(tmp_path, True)
    assert remarks == []
    assert scored.scores["accuracy"] < 1.0, "this base never ends"


def test_probabilities_are_exclusive() -> None:
    """net, network, networks, netlify, news: what is left of each without its continuations."""
    labels = ((1,), (1, 2), (1, 2, 3), (1, 4), (5, 1))
    assert continuations(labels) == ((1, 3), (2,), (), (), ())
    rows = [[Example.with_target((9, *ids), 1, 0) for ids in labels]] * 2
    share = float64([0.6, 0.3, 0.1, 0.2, 0.25], [0.5, 0.5, 0.5, 1e-9, 0.2])
    probabilities = exclusive(-share.log(), rows).neg().exp()
    wanted = float64([0.1, 0.2, 0.1, 0.2, 0.25], [0.0, 0.0, 0.5, 1e-9, 0.2])
    torch.testing.assert_close(probabilities, wanted, rtol=1e-9, atol=1e-11)
    assert probabilities.isfinite().all()


def float64(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_targets_of_equal_length_are_unchanged() -> None:
    rows = [[Example.with_target((9, *ids), 1, 0) for ids in ((1, 2), (1, 3))]]
    nll_RC = torch.tensor([[0.3, 0.2]], dtype=torch.float64)
    assert torch.equal(exclusive(nll_RC, rows), nll_RC)
