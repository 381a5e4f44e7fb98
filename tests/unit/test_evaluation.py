"""What is generated from, and how it is scored, for the forms that rows may have."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks import random_base
from benchmarks.unsharded_base import load_unsharded
from tests.one_rank import OneRank
from tests.unit.test_chat import TURNS, make_tokenizer, words
from trainer.config import Base, RunConfig
from trainer.data.task_data import TaskData, load_tasks
from trainer.data.teacher import Teacher
from trainer.evaluation import evaluator as evaluator_module
from trainer.evaluation import generation
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.generation import Generated
from trainer.evaluation.scoring import Request, Scored
from trainer.evaluation.stop_criteria import StopCriteria
from trainer.model.checkpoint_files import open_base
from trainer.packing.activation_memory import TokenBudget
from trainer.prompts.soft_prompt import VirtualTokens
from trainer.runtime.stop_signals import Stopped

ROOT = Path(__file__).resolve().parents[2]


def load(folder: Path, rows: list[dict], tokenizer=None, **task) -> TaskData:
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
    tokenizer = tokenizer or make_tokenizer()
    return load_tasks(config, tokenizer, 64, len(tokenizer))["t"]


def fake_base(**settings: Any) -> Any:
    """What generation asks of a base, but for the numbers."""
    model = SimpleNamespace(generation_config=GenerationConfig(**settings))
    return SimpleNamespace(unpacked=nullcontext, model=model)


def score(data: TaskData, monkeypatch, written: list[str]) -> tuple[dict[str, float], list[str]]:
    """The metrics of these texts, and what the base was given to write them."""
    given = []

    def generate(engine, base, ending, inputs, prompt, limit, **_):
        given.extend(words(ending.tokenizer, ids) for ids in inputs)
        return [Generated(ending.tokenizer(text)["input_ids"], 0.0) for text in written]

    monkeypatch.setattr(evaluator_module, "generate", generate)
    base = fake_base(eos_token_id=[1, 6])  # </s> and <end>
    evaluator = Evaluator(OneRank(), base, make_tokenizer(), TokenBudget(64))  # type: ignore[arg-type]
    return evaluator._generated(data.evaluation["validation"], None).scores, given


def test_the_last_answer_of_a_dialogue(tmp_path, monkeypatch):
    rows = [{"messages": TURNS}, {"messages": TURNS[1:3]}]
    data = load(tmp_path, rows, messages="messages", metric="exact_match")
    scores, given = score(data, monkeypatch, [" e f g", "d"])
    assert given == [
        "<s> <system> sys <end> <user> a b <end> <assistant> c <end> <user> d <end> <assistant>",
        "<s> <user> a b <end> <assistant>",
    ]
    assert scores == {"exact_match": 0.5}
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
    scores, given = score(data, monkeypatch, [" d , c", "c , x"])
    assert given == ["a b", "a"]
    expected = {"f1": pytest.approx(2 * 3 / (4 + 3)), "exact_match": 0.5}
    expected["f1_standard_error"] = pytest.approx(8 / 49)
    assert scores == (expected if metric == "f1" else {"exact_match": 0.5})


def test_choices_with_a_common_first_token_are_scored_by_all_tokens(tmp_path):
    """The likeliest as a whole, its end included, as transformers has it."""
    tiny = ROOT / "examples" / "tiny_base"
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    choices = ["cardiac arrest", "cardiac failure", "cardiac"]
    ids = [tokenizer(f" {choice}")["input_ids"] for choice in choices]
    assert len({first for first, *_ in ids}) == 1
    texts = ["The heart stands", "He had a", "cardiac failure, cardiac failure, cardiac failure,"]
    likeliest = []
    for text in texts:
        start, nll = tokenizer(text)["input_ids"], []
        for choice in ids:
            label = torch.tensor([*choice, tokenizer.eos_token_id])
            with torch.no_grad():
                logits = model(torch.tensor([[*start, *label]])).logits[0, len(start) - 1 : -1]
            nll.append(float(torch.nn.functional.cross_entropy(logits, label, reduction="sum")))
        likeliest.append(nll.index(min(nll)))
    assert set(likeliest) != {0}, "the first token alone would do"
    rows = [{"text": t, "label": choices[k]} for t, k in zip(texts, likeliest, strict=True)]
    rows.append({"text": texts[0], "label": choices[0]})
    task = {"input": "{text}", "target": " {label}", "choices": choices, "metric": "accuracy"}
    data = load(tmp_path, rows, tokenizer, **task)
    evaluator = Evaluator(OneRank(), load_unsharded(tiny, "none"), tokenizer, TokenBudget(100))
    request, texts = Request(data.evaluation["validation"], None), []
    (scores,) = evaluator.score([request], [], texts.append)
    assert sum(texts) == evaluator.num_texts([request]) == 4, "progress ends at the number of texts"
    assert scores.scores["accuracy"] == 3 / 4
    assert scores.predicted == [*likeliest, likeliest[0]]
    assert scores.nll_RC.shape == (4, 3)


def test_a_row_whose_choices_need_several_packed_batches_is_one_text(tmp_path):
    rows = [{"text": f"w3 w4 w{i}", "label": "w5"} for i in range(6, 10)]
    tokenizer, task = random_base.make_tokenizer(), {"input": "{text}", "target": " {label}"}
    choices = [f"w{i}" for i in range(5, 13)]
    data = load(tmp_path, rows, tokenizer, choices=choices, metric="accuracy", **task)
    base, read = load_unsharded(random_base.save_random(tmp_path / "base"), "none"), []
    base.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    evaluator = Evaluator(OneRank(), base, tokenizer, TokenBudget(8))  # type: ignore[arg-type]
    request, texts = Request(data.evaluation["validation"], None), []
    evaluator.score([request], [], texts.append)
    assert len(read) > len(rows), "choices of one row are in several packed batches"
    assert sum(texts) == pytest.approx(evaluator.num_texts([request])) == 4


def test_equal_requests_are_computed_once(tmp_path, monkeypatch):
    rows = [{"text": f"w3 w4 w{i}", "label": "w5"} for i in range(6, 9)]
    tokenizer, task = random_base.make_tokenizer(), {"input": "{text}", "target": " {label}"}
    data = load(tmp_path, rows, tokenizer, choices=["w5", "w6"], metric="accuracy", **task)
    validation = data.evaluation["validation"]
    assert validation.num_shared == 2
    base, read = load_unsharded(random_base.save_random(tmp_path / "base"), "none"), []
    base.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    evaluator = Evaluator(OneRank(), base, tokenizer, TokenBudget(100))  # type: ignore[arg-type]
    requests = [Request(validation, None), Request(validation.subset([0]), None)]
    requests.append(requests[0])
    scored = evaluator.score(requests, [])
    assert evaluator.num_texts(requests) == 4
    (batch,) = read
    assert len(batch.token_ids_T) == 2 + 3 * (1 + 2) + (3 + 2), "shared text, rows, one row alone"
    assert scored[2] == scored[0]
    torch.testing.assert_close(scored[1].nll_RC, scored[0].nll_RC[:1])


def test_stop_signals_are_handled_between_generation_batches(tmp_path, monkeypatch):
    data = load(tmp_path, [{"messages": TURNS}], messages="messages", metric="exact_match")
    monkeypatch.setattr(evaluator_module.stop_signals, "stop_requested", lambda: True)
    evaluator = Evaluator(OneRank(), fake_base(), make_tokenizer(), TokenBudget(64))  # type: ignore[arg-type]
    with pytest.raises(Stopped):
        evaluator._generated(data.evaluation["validation"], None)


def test_generation_batches_stay_within_the_token_budget(monkeypatch):
    """One at least; how many makes no difference to what is written."""
    sizes: list[int] = []

    def decode(engine, base, ending, rows, prompt, limit, prompt_at, texts):
        sizes.append(len(rows))
        return [[sum(row)] for row in rows]

    monkeypatch.setattr(generation, "_decode", decode)
    ending = StopCriteria(make_tokenizer(), frozenset())
    inputs = [[n] * (n + 1) for n in range(8)]
    prompt = VirtualTokens(torch.zeros(2, 4))
    for most, expected in ((None, [8]), (45, [3, 3, 2]), (1, [1] * 8)):
        sizes.clear()
        texts = generation.generate(
            OneRank(), fake_base(), ending, inputs, prompt, 5, max_tokens=most
        )
        assert texts == [[n * (n + 1)] for n in range(8)]
        assert sizes == expected


def test_a_teacher_is_scored_like_its_text_prepended_to_the_rows(tmp_path):
    """Loss, predicted choices and generated texts are those of plain transformers."""
    tiny = ROOT / "examples" / "tiny_base"
    files = open_base(Base(model=str(tiny)))
    text = "Is the condition metabolic, cardiac or other?"
    rows = [{"text": t, "label": "cardiac"} for t in ("He has angina.", "She takes insulin.")]
    task = {"input": "{text}\nAnswer:", "target": " {label}", "metric": "accuracy"}
    teacher = Teacher(0, tuple(files.tokenizer(text)["input_ids"]), 0)
    base = load_unsharded(tiny, "none")
    embedded = VirtualTokens(base(torch.tensor(teacher.token_ids), []).embeddings_TH.detach())
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)

    def scored(**settings: Any) -> Scored:
        data = load(tmp_path, rows, files.tokenizer, **task | settings)
        evaluator = Evaluator(OneRank(), base, files.tokenizer, TokenBudget(200))
        request = Request(data.evaluation["validation"].with_teacher(teacher), 0)
        return evaluator.score([request], [embedded])[0]

    choices = ["metabolic", "cardiac", "other"]
    scores = scored(choices=choices)
    nll_RC = []
    for row in rows:
        front = [*teacher.token_ids, *files.tokenizer(f"{row['text']}\nAnswer:")["input_ids"]]
        nll_RC.append([])
        for choice in choices:
            behind = [*files.tokenizer(f" {choice}")["input_ids"], files.tokenizer.eos_token_id]
            with torch.no_grad():
                logits = plain(torch.tensor([[*front, *behind]])).logits[0, len(front) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(behind), reduction="sum")
            nll_RC[-1].append(float(loss))
    assert scores.nll_RC is not None
    assert torch.allclose(scores.nll_RC, torch.tensor(nll_RC).double(), atol=1e-3)
    assert scores.predicted == [nll.index(min(nll)) for nll in nll_RC]
    scores = scored(metric="exact_match", max_new_tokens=5)
    for row, written in zip(rows, scores.texts_R or [], strict=True):
        front = [*teacher.token_ids, *files.tokenizer(f"{row['text']}\nAnswer:")["input_ids"]]
        out = plain.generate(torch.tensor([front]), do_sample=False, max_new_tokens=5)
        expected = files.tokenizer.decode(out[0, len(front) :], skip_special_tokens=True)
        assert written == expected


def test_a_generated_choice_is_compared_with_the_rows_label(tmp_path, monkeypatch):
    """Not with the first choice, whose tokens stand first among the row's candidates."""
    rows = [{"text": "a b", "label": "d"}, {"text": "a", "label": "c"}]
    task = {"input": "{text}", "target": " {label}", "choices": ["c", "d"]}
    data = load(tmp_path, rows, **task, metric="exact_match")
    scores, _ = score(data, monkeypatch, ["d", "c"])
    assert scores == {"exact_match": 1.0}
