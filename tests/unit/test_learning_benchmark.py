"""The benchmark of learning: both sides have the same loss and scores, and its table says what was
found."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.learning import ours, peers
from benchmarks.learning import tiny_base as benchmark
from benchmarks.learning.report import best_rate, plot, reached, summary, table
from benchmarks.unsharded_base import load_unsharded
from tests.one_rank import OneRank
from trainer.config import load
from trainer.distributed.prefetch import prepare_batch
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.scoring import Request
from trainer.packing.activation_memory import TokenBudget
from trainer.packing.batch_source import BatchSource
from trainer.packing.packed_row import PackedRow
from trainer.prompts.soft_prompt import VirtualTokens, prompt_lengths
from trainer.training.step import batch_objective

ROOT = Path(__file__).resolve().parents[2]
BUDGET = benchmark.BUDGET | {"tasks": ["triage", "codegen"], "validation_rows": 6}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> peers.Data:
    path, _ = ours.run_file(
        tmp_path_factory.mktemp("learning") / "run", BUDGET, [0, 1], with_text=True
    )
    return peers.Data(load(path))


def peer(data: peers.Data, arm: str, task: str) -> tuple[Any, torch.Tensor, peers.Job]:
    """A PeftModel and the virtual tokens that it starts from."""
    text = "Write this as Python code."
    job = peers.Job(arm, task, 0.01, 0, text, (1,))
    base, method = peers.plain_base(data.folder), peers.ARMS[arm]
    model = peers.peft_model(base, method, seed=0, text=text, num_virtual_tokens=20)
    with torch.no_grad():
        return model, VirtualTokens(model.get_prompt(batch_size=1)[0]), job


@pytest.mark.parametrize("arm", ["prompt tuning, text", "p-tuning"])
def test_both_sides_train_on_the_same_loss(data: peers.Data, arm: str) -> None:
    """PEFT on padded rows and our packed batch, from one prompt, on the first update's rows."""
    model, prompt, job = peer(data, arm, "triage")
    rows = next(data.updates(job.task, job.seed))
    assert len(rows) > 5
    theirs = peers.mean_loss(model, rows)
    packed_rows = [PackedRow(row, 0, i) for i, row in enumerate(rows)]
    batch = prepare_batch(packed_rows, prompt_lengths([prompt]), torch.device("cpu"))
    base = load_unsharded(ROOT / data.folder, "none")
    loss, _ = batch_objective(base, batch, [prompt], [sum(row.num_labels for row in rows)])
    assert float(loss) == pytest.approx(float(theirs.detach()), abs=1e-5)


@pytest.mark.parametrize("task", ["triage", "codegen"])
def test_both_sides_are_scored_equally(data: peers.Data, task: str) -> None:
    model, prompt, _ = peer(data, "prompt tuning, text", task)
    rows = data.tasks[task].evaluation["validation"]
    theirs = peers.score(model, data, rows)
    base = load_unsharded(ROOT / data.folder, "none")
    evaluator = Evaluator(OneRank(), base, data.tokenizer, TokenBudget(4000))
    (scores,) = evaluator.score([Request(rows, 0)], [prompt])
    assert theirs == pytest.approx({key: scores.scores[key] for key in theirs}, abs=1e-5)


def test_rows_are_those_of_our_prompt(data: peers.Data) -> None:
    settings = next(p for p in data.config.prompts if (p.task, p.seed) == ("triage", 1))
    feed = BatchSource(data.config, data.tasks)
    k = data.config.prompts.index(settings)
    for rows in itertools.islice(data.updates("triage", 1), 3):
        ours = [
            packed_row.example.row
            for packed_row in feed.next_step([True] * 12)
            if packed_row.prompt == k
        ]
        assert [row.row for row in rows] == ours


def training(arm: str, seed: int, rate: float | None, *values: float) -> dict[str, Any]:
    """What one training scored at steps 2, 4 ..."""
    scores = {str(2 * i + 2): {"accuracy": x, "loss": 1 - x} for i, x in enumerate(values)}
    return {"arm": arm, "task": "triage", "rate": rate, "seed": seed, "scores": scores}


def example_results() -> dict[str, Any]:
    quick, vocab = "ours, prompt_tuning", "prompt tuning, vocab"
    return {
        "budget": BUDGET | {"tasks": ["triage"]},
        "ours": [training(quick, seed, None, 0.8, 0.9 + seed / 100) for seed in range(3)],
        "peers": [
            *(training(vocab, seed, 0.01, 0.2, 0.5 + seed / 5) for seed in range(3)),
            *(training(vocab, seed, 0.1, 0.6) for seed in range(3)),
            *(training("LoRA", seed, 0.01, 0.9, 1.0) for seed in range(3)),
        ],
    }


def test_table_compares_with_the_best_rate(tmp_path: Path) -> None:
    report = summary(example_results())
    assert best_rate(example_results()["peers"], "prompt tuning, vocab", "triage") == 0.01
    (row,) = report["figures"]["triage"]
    assert row["peer"] == "PEFT, prompt tuning, vocab", "LoRA is shown, but is no prompt"
    assert row["scores"] == pytest.approx([0.91, 0.7])
    assert row["spreads"] == pytest.approx([0.02, 0.4])
    assert row["steps"] == [2, 4]
    assert reached(row) == "score, spread, steps"
    assert (
        reached(row | {"scores": [1.0, 1.0], "spreads": [0.3, 0.4], "steps": [None, 4]}) == "none"
    )
    text = table(report, "plot.png")
    assert (
        "| triage | ours, prompt_tuning, beside PEFT, prompt tuning, vocab | 0.910, 0.700: better"
        in text
    )
    assert "| PEFT, LoRA | 0.01 of 0.01 | 0.900 | 1.000 |" in text
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert json.loads(json.dumps(report))["figures"]["triage"][0]["steps"] == [2, 4]


def test_ranges_move_until_the_best_rate_is_at_no_edge() -> None:
    rates, pair = [0.01, 0.03, 0.1], ("prompt tuning, vocab", "triage")
    done = [training(pair[0], 0, rate, rate) for rate in rates]
    assert benchmark.moved(rates, pair, done) == 0.3
    assert benchmark.within(rates, 0.3) == [0.03, 0.1, 0.3]
    assert benchmark.moved([0.03, 0.1, 0.3], pair, [*done, training(pair[0], 0, 0.3, 0)]) is None


@pytest.mark.parametrize("kept", [True, False], ids=["same budget", "another budget"])
def test_one_side_is_measured_and_the_other_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    before = example_results() | {
        "budget": benchmark.BUDGET if kept else benchmark.BUDGET | {"steps": 1}
    }
    (tmp_path / "learning.json").write_text(json.dumps(before))
    new = [training("ours, prompt_tuning", 0, None, 0.1, 0.2)]
    done = SimpleNamespace(wait=lambda: 0)
    reported: dict[str, Any] = {}
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(ours, "run_file", lambda path, *_, with_text: (path, {}))
    monkeypatch.setattr(ours, "train", lambda *_: done)
    monkeypatch.setattr(ours, "results", lambda _: new)
    monkeypatch.setattr(benchmark, "summary", lambda report: reported.update(report) or report)
    monkeypatch.setattr(benchmark, "table", lambda *_: "")
    monkeypatch.setattr(benchmark, "plot", lambda *_: None)
    benchmark.main(["--only", "ours"])
    assert reported["ours"] == reported["ours, with instruction"] == new
    assert reported["peers"] == (before["peers"] if kept else None)
    assert json.loads((tmp_path / "learning.json").read_text()) == reported
