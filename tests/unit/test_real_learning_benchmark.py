"""The benchmark of learning on a real model: PEFT's arms on packed rows, cells, plan and table."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.learning import ours, peers, tiny_base
from benchmarks.learning.real import command, own_runs, tables
from benchmarks.learning.real.cells import Cell, Cells
from benchmarks.learning.real.laboratory import BestStep
from benchmarks.learning.real.packed_peft import PEERS, PackedModel, common_tokens, pack, score
from benchmarks.learning.real.plan import HAND_WRITTEN, MAJORITY, Design, Job, Reviews, jobs
from trainer.config import load

ROOT = Path(__file__).resolve().parents[2]
LORA, OURS = "PEFT LoRA r8", "ours, prompt_tuning, system"
DESIGN = Design(
    arms=(HAND_WRITTEN, MAJORITY, OURS, LORA),
    tasks=("condition",),
    seeds=(0, 1),
    rows=(128, 32),
    steps=4,
    tokens_per_step=64,
    reviews={"condition": Reviews(words=0, validation_rows=4)},
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> peers.Data:
    budget = tiny_base.BUDGET | {"tasks": ["triage"], "validation_rows": 6}
    folder = tmp_path_factory.mktemp("learning") / "run"
    return peers.Data(load(ours.run_file(folder, budget, [0], with_text=True)[0]))


@pytest.fixture(scope="module")
def base(data: peers.Data) -> Any:
    return peers.plain_base(data.folder)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()))
    return dict(zip(trained, found, strict=True))


@pytest.mark.parametrize("arm", PEERS)
def test_packed_rows_have_the_loss_and_gradients_of_peft(
    data: peers.Data, base: Any, arm: str
) -> None:
    rows = next(data.updates("triage", 0))[:5]
    common = common_tokens(rows)[:3]
    model = peers.peft_model(
        base, PEERS[arm].method, seed=0, text="Name the topic.", num_virtual_tokens=5
    )
    with torch.no_grad():  # LoRA begins with zeros, which would hide a wrong first factor
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    packed = PackedModel(model, common)
    batch = pack([[row] for row in rows], len(common))
    losses = packed.losses(batch)
    own, theirs = losses.mean(), peers.mean_loss(model, rows)
    assert float(own.detach()) == pytest.approx(float(theirs.detach()), abs=2e-5)
    expected = gradients(model, theirs)
    for name, gradient in gradients(model, own).items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-3)
    assert torch.allclose(packed.scores(batch), losses, atol=2e-5)
    assert torch.allclose(packed.scores(batch), losses, atol=2e-5), "the kept prompt has changed"


def test_packed_candidates_are_scored_as_separate_rows(data: peers.Data, base: Any) -> None:
    rows = data.tasks["triage"].evaluation["validation"]
    model = peers.peft_model(
        base, peers.FROM_TEXT, seed=0, text="Name the topic.", num_virtual_tokens=5
    )
    common = common_tokens(candidates[0] for candidates in rows.candidates)
    theirs, own = peers.score(model, data, rows), score(PackedModel(model, common), rows)
    assert {key: own[key] for key in theirs} == pytest.approx(theirs, abs=2e-5)
    assert sum(own["correct"]) == own["accuracy"] * len(rows.candidates)


def test_the_adapter_of_the_best_step_on_held_out_rows_counts(data: peers.Data, base: Any) -> None:
    rows = data.tasks["triage"].evaluation["validation"]
    common = common_tokens(candidates[0] for candidates in rows.candidates)
    model = peers.peft_model(
        base, peers.FROM_TEXT, seed=0, text="Name the topic.", num_virtual_tokens=5
    )
    (trained,) = (p for p in model.parameters() if p.requires_grad)
    best, scores = BestStep(model, common, rows, [1, 3]), {}
    for step in range(1, 5):
        with torch.no_grad():
            trained.add_(torch.randn_like(trained))
        found = score(PackedModel(model, common), rows)
        scores[step] = {key: found[key] for key in ("loss", "accuracy")}
        best.after(step)
    expected = min((1, 3), key=lambda step: (-scores[step]["accuracy"], scores[step]["loss"]))
    assert best.restore() == {"step": expected, "held_back": scores[expected]}
    assert score(PackedModel(model, common), rows)["loss"] == scores[expected]["loss"]


def test_longer_runs_have_steps_to_choose_from() -> None:
    assert own_runs.choice_of_step(60) == {}, "results of earlier calls stay valid"
    assert own_runs.choice_of_step(240) == {"best_of_steps": [50, 100, 150, 200, 240]}


CELL = Cell(LORA, "condition", 128, 4, 64, 4, 0, seed=0, rate=0.01)


def test_cells_continue_from_committed_results_and_ignore_those_of_other_settings(
    tmp_path: Path,
) -> None:
    first = Cells(tmp_path / "first", tmp_path / "none.json")
    first.put(CELL, {"momentum": 0.5}, {"loss": 1.0})
    first.put(replace(CELL, seed=1), {"momentum": 0.5}, {"loss": 2.0})
    committed = tmp_path / "committed.json"
    committed.write_text(json.dumps({"cells": list(first)}))
    second = Cells(tmp_path / "second", committed)
    assert second.get(CELL, {"momentum": 0.5}) == {"loss": 1.0}
    assert second.get(CELL, {"momentum": 0.6}) is None
    second.put(CELL, {"momentum": 0.5}, {"loss": 3.0})
    again = Cells(tmp_path / "second", committed)
    assert again.get(CELL, {"momentum": 0.5}) == {"loss": 3.0}
    assert [record["result"]["loss"] for record in again] == [3.0, 2.0]


def test_rates_are_tried_before_the_best_is_validated_and_other_seeds_follow() -> None:
    found = list(jobs(DESIGN, lambda cell: 0.003, lambda task: 170))
    shown = [(job.cells[0].arm, job.cells[0].seed, job.cells[0].rate) for job in found]
    assert shown[:3] == [(HAND_WRITTEN, 0, None), (MAJORITY, 0, None), (OURS, 0, None)]
    rates = [3e-3, 1e-3, 1e-2, 3e-4, 3e-2]
    assert shown[3:8] == [(LORA, 0, rate) for rate in rates]
    assert shown[8] == (LORA, 0, 0.003)
    assert found[8].validate
    assert shown[9:11] == [(OURS, 1, None), (LORA, 1, 0.003)]
    assert {job.cells[0].rows for job in found[11:]} == {0, 32}
    few = jobs(DESIGN, lambda cell: 0.003, lambda task: 31)
    assert all(job.cells[0].rows != 32 for job in few), "the task has no 32 rows"


def trained(*correct: int, loss: float = 0.5) -> dict[str, Any]:
    accuracy = sum(correct) / len(correct)
    return {
        "validation": {"accuracy": accuracy, "loss": loss, "correct": list(correct)},
        "held_back": {"loss": loss},
        "trained_parameters": 11520,
        "train_seconds": 2.0,
        "text_tokens": 100,
        "train_flops": 1e12,
    }


class FakeLaboratory:
    """Has results of some cells."""

    def __init__(self, results: dict[Cell, dict[str, Any]]) -> None:
        self._results = results
        self.cells = [{"cell": asdict(cell)} for cell in results]
        self.files = self

    def num_train(self, task: str) -> int:
        return 100

    def result(self, cell: Cell) -> dict[str, Any] | None:
        return self._results.get(cell)

    def best_rate(self, cell: Cell) -> float | None:
        return 0.01 if replace(cell, rate=0.01) in self._results else None


def test_table_states_losses_and_what_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours_cell = DESIGN.cell(OURS, "condition", 128, 0)
    lora = replace(DESIGN.cell(LORA, "condition", 128, 0), rate=0.01)
    results = {
        ours_cell: trained(*[0] * 12, *[1] * 8),
        replace(ours_cell, seed=1): trained(*[0] * 11, *[1] * 9),
        lora: trained(*[1] * 20, loss=0.1),
    }
    results[replace(ours_cell, steps=80)] = trained(*[1] * 15, *[0] * 5, loss=0.25) | {"step": 50}
    answer = replace(DESIGN.cell(MAJORITY, "condition", 128, 0), steps=0, tokens_per_step=0)
    results[answer] = trained(*[1] * 5, *[0] * 15) | {"answer": "asthma"}
    results[ours_cell]["baselines"] = {
        "hand_written-1": {"accuracy": 0.2, "loss": 5.0, "correct": [1] * 4 + [0] * 16}
    }
    text_cell = replace(DESIGN.cell(HAND_WRITTEN, "condition", 0, 0), steps=0, tokens_per_step=0)
    results[text_cell] = trained(*[1] * 5, *[0] * 15, loss=4.0)
    laboratory: Any = FakeLaboratory(results)
    text = tables.tables(laboratory, DESIGN, "plot.png")
    assert f"- condition, {OURS}: **worse**: {LORA} (-57.5," in text
    assert "| 0.01 of 0.01 | 0 | 0.0 | 11,520 |" in text
    assert f"| condition, {LORA} | 50 | 2 | 1e12 |  |" in text
    assert f"| condition, {LORA} | 1 | 1 | 128 |" in text
    assert f"| condition, {OURS} |  | 2 | 128 |" in text
    assert "| condition, PEFT IA3 | 0 | not run | not run |" in text
    assert f"| condition, {HAND_WRITTEN} |  |  | 32, 128 |" in text
    assert f"| condition | {HAND_WRITTEN} | int8 | 20.0% | 5.000 |  |" in text
    assert f"| condition | {HAND_WRITTEN} | 16 bits | 25.0% | 4.000 | -5.0," in text
    assert "- **condition**: 100 training rows, 4 validation rows, whole reviews." in text
    assert f"| condition, {OURS} | {DESIGN.steps} | 4, 4 | 42.5% |" in text
    assert f"| condition, {OURS} | 80 | 50 | 75.0% | +50.0, " in text
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    command.write(laboratory, DESIGN)
    assert (tmp_path / "learning-smollm2.png").stat().st_size > 1000
    written = json.loads((tmp_path / "learning-smollm2.json").read_text())
    assert written["cells"] == laboratory.cells
    assert written["scores"][f"condition, 128 rows, {OURS}"]["seeds"] == [0, 1]


def test_a_cell_depends_on_the_resolved_settings_of_its_prompt() -> None:
    task = {"name": "condition", "train": "-", "input": "{a}", "target": "{b}", "chat": True}
    task["hand_written"] = ["Name it."]
    cell = DESIGN.cell(OURS, "condition", 128, 0)
    settings = own_runs.settings_of(cell, task, "digest")
    assert settings["prompt"]["position"] == "system"
    assert settings["prompt"]["optimizer"] is not None, "defaults are resolved"
    assert own_runs.settings_of(cell, task, "other")["rows"] != settings["rows"]
    other = replace(cell, arm="base in 16 bits")
    assert own_runs.settings_of(other, task, "digest")["base"] != settings["base"]


def test_arms_are_chosen_by_a_part_of_their_name() -> None:
    def fail(message: str) -> None:
        raise ValueError(message)

    assert command.chosen_arms(["lora"], fail) == (HAND_WRITTEN, LORA)
    assert OURS in command.chosen_arms(None, fail)
    with pytest.raises(ValueError, match="no arm has 'qlora' in its name"):
        command.chosen_arms(["qlora"], fail)


def test_budget_ends_before_the_next_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[Job] = []

    class Counted:
        def missing(self, design: Design) -> list[Job]:
            return [Job((CELL,)), Job((CELL,))]

        def run(self, job: Job) -> None:
            done.append(job)

        def result(self, cell: Cell) -> dict[str, Any]:
            return trained(1, 0)

    clock = iter([0.0, 1.0, 10.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    counted: Any = Counted()
    command.run(counted, DESIGN, 5.0)
    assert len(done) == 1
    assert "the time is over: 2 jobs are left" in capsys.readouterr().err
