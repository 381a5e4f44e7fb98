"""The order of events, over a base of a few lines: who is read, validated and stopped, and when."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from tests.one_rank import OneRank
from tests.unit.test_chat import make_tokenizer
from trainer.checkpointing.state_tensors import join_tensors, split_tensors
from trainer.config import RunConfig
from trainer.data.task_data import load_tasks
from trainer.distributed.prefetch import RankInfo, StepPrefetcher
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.prediction_files import (
    baseline_file,
    path_of,
    read,
    step_of,
    train_file,
)
from trainer.evaluation.prediction_records import Predictions
from trainer.evaluation.scoring import Scored
from trainer.model.layers.lm_head import LabelLosses
from trainer.model.prompted_model import ForwardResult
from trainer.packing.activation_memory import TokenBudget
from trainer.packing.batch_source import BatchSource
from trainer.packing.packed_batch import PackedBatch
from trainer.prompts.bank import Bank
from trainer.prompts.soft_prompt import SoftPrompt
from trainer.runtime.console import Console
from trainer.runtime.stop_signals import Stopped
from trainer.training.callbacks import Callback, ConsoleProgress, Metrics, StepReport
from trainer.training.loop import Loop
from trainer.training.prompt_optimizer import make_optimizer
from trainer.training.skipped_updates import Diverged
from trainer.training.validation import gaps, validation_steps

H, VOCAB = 4, 19
TABLE_VH = torch.randn(VOCAB, H, generator=torch.Generator().manual_seed(5))
CPU = torch.device("cpu")


class ToyBase(nn.Module):
    """A label's loss is how far its prompt's virtual tokens are from its word's embedding.

    Attributes:
        read: (step, in training, prompts of the packed batch) of every forward.
    """

    packed = True

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[int, bool, list[int]]] = []
        self.loop: Loop | None = None

    def forward(
        self, batch: PackedBatch, virtual_tokens: list[SoftPrompt], teacher_DH: Tensor | None = None
    ) -> ForwardResult:
        assert self.loop is not None
        step = self.loop.progress.step
        self.read.append((step, torch.is_grad_enabled(), [k for k, _ in batch.prompts]))
        losses = []
        for k, label in zip(batch.label_prompt_N.tolist(), batch.labels_N.tolist(), strict=True):
            if k < 0:
                losses.append(torch.tensor(1.0))
            else:
                losses.append(((virtual_tokens[k].tensor - TABLE_VH[label]) ** 2).mean())
        return ForwardResult(LabelLosses(torch.stack(losses)))


class Recorder(Callback):
    """Records the metrics of a toy run, and its state as a checkpoint holds it."""

    def __init__(self, toy: Toy) -> None:
        self.toy = toy

    def on_step_end(self, report: StepReport) -> None:
        self._record(report.metrics)

    def on_validation_end(self, metrics: Sequence[Metrics]) -> None:
        self._record(metrics)

    def on_checkpoint(self) -> None:
        self.toy.save()

    def _record(self, metrics: Sequence[Metrics]) -> None:
        self.toy.logged += [(m.step, m.prompt, dict(m.values)) for m in metrics]
        self.toy.tokens += [(m.prompt, m.useful_tokens) for m in metrics]


class Toy:
    """A run over two tasks; ``saved`` holds a checkpoint of every step, as files hold it."""

    def __init__(
        self,
        folder: Path,
        prompts: list[dict[str, Any]],
        predictions: Predictions | None = None,
        **sections: Any,
    ) -> None:
        tasks = []
        for name, words in (("x", "abcd"), ("y", "efg")):
            path = folder / f"{name}.jsonl"
            rows = [{"text": f"{a} {b}", "label": b} for a in words for b in words[:2]]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            tasks.append({"name": name, "train": str(path), "validation": str(path)})
            tasks[-1] |= {"shifted_validation": str(path), "input": "{text}", "target": " {label}"}
        self.config = RunConfig.model_validate(
            {
                "output_dir": "out",
                "base": {"model": "m"},
                "tasks": tasks,
                "prompts": [
                    {"task": "x", "num_virtual_tokens": 2, "learning_rate": 0.1, **p}
                    for p in prompts
                ],
                "training": {"steps": 8, "tokens_per_step": 12},
                "checkpoint": {"every": 1},
                **sections,
                "evaluation": {"every": 4, "train_rows": 0} | sections.get("evaluation", {}),
            }
        )
        tokenizer = make_tokenizer()
        data = load_tasks(self.config, tokenizer, 64, VOCAB)
        self.engine, self.base, self.out = OneRank(), ToyBase(), io.StringIO()
        engine: Any = self.engine
        self.bank = Bank(
            self.config,
            lambda ids: TABLE_VH[torch.tensor(ids)],
            tokenizer,
            VOCAB,
            H,
            CPU,
            make_optimizer=make_optimizer,
        )
        self.logged: list[tuple[int, str | None, dict[str, float]]] = []
        self.tokens: list[tuple[str | None, int]] = []
        self.saved: dict[int, tuple[bytes, str]] = {}
        evaluator = Evaluator(engine, self.base, tokenizer, TokenBudget(200))  # type: ignore[arg-type]
        console = Console(self.out, self.out)
        self.loop = Loop(
            self.config,
            engine,
            evaluator,
            data,
            self.bank,
            StepPrefetcher(BatchSource(self.config, data), RankInfo(0, 1, CPU)),
            console,
            [Recorder(self), ConsoleProgress(console, self.config.last_step)],
            predictions,
        )
        self.base.loop = self.loop

    def save(self) -> None:
        tensors, bank = split_tensors(self.bank.state_dict())
        state = json.dumps({"bank": bank, "loop": self.loop.state_dict()})
        self.saved[self.loop.progress.step] = (to_bytes(tensors), state)

    def resume(self, saved: tuple[bytes, str]) -> Toy:
        state = json.loads(saved[1])
        self.bank.load_state_dict(join_tensors(from_bytes(saved[0]), state["bank"]))
        self.loop.load_state_dict(state["loop"])
        return self

    def run(self) -> Toy:
        self.loop.run()
        return self

    @property
    def stopped(self) -> dict[str, tuple[int, str]]:
        stopped = self.loop.progress.stopped
        return {name: (end["step"], end["reason"]) for name, end in stopped.items()}

    def losses(self, step: int) -> dict[str, float]:
        return {
            str(name): metrics["validation_loss"]
            for at, name, metrics in self.logged
            if at == step and "validation_loss" in metrics
        }


def tokens(toy: Toy, name: str) -> Tensor:
    return toy.bank.snapshot(toy.bank.names.index(name)).tensor


def test_a_prompt_stops_at_its_own_step_and_costs_nothing_afterwards(tmp_path):
    short = {"name": "short", "steps": 3, "method": "p_tuning"}
    toy = Toy(tmp_path, [short, {"name": "long", "num_virtual_tokens": 5}])
    calls: list[int] = []
    toy.bank._encoders[0].register_forward_hook(lambda *_: calls.append(toy.loop.progress.step))
    toy.run()
    assert toy.stopped == {"short": (3, "finished"), "long": (8, "finished")}
    train = [prompts for _, training, prompts in toy.base.read if training]
    assert train[:3] == [[0, 1]] * 3
    assert train[3:] == [[1]] * 5, "rows and virtual tokens have left the packed batches"
    validated = {(step, k) for step, training, p in toy.base.read for k in p if not training}
    assert validated == {(3, 0), (4, 1), (8, 1)}
    # Losses, splits, stops, gradients.
    both, long_alone = 2 + 1 + 1 + (2 + 5) * H, 2 + 1 + 1 + 5 * H
    sent = [numbers for numbers in toy.engine.reduced if numbers in (both, long_alone)]
    assert sent == [both] * 3 + [long_alone] * 5
    # To be validated, kept as the best, and once more for all steps that follow.
    assert [step for step in calls if step > 3] == []
    assert len([step for step in calls if step == 3]) <= 3


def test_the_schedule_of_a_prompt_is_as_long_as_its_own_steps(tmp_path):
    short = {"name": "short", "steps": 3}
    together = Toy(tmp_path, [{"name": "long"}, short]).run()
    alone = Toy(tmp_path, [{"name": "short"}], training={"steps": 3, "tokens_per_step": 12}).run()
    assert torch.equal(tokens(together, "short"), tokens(alone, "short"))
    assert together.loop.progress.scores["short"] == alone.loop.progress.scores["short"]
    assert together.loop.progress.step == 8


def test_a_prompt_that_needs_more_steps_than_the_others_goes_on(tmp_path):
    toy = Toy(tmp_path, [{"name": "long", "steps": 10}, {"name": "usual"}]).run()
    assert toy.stopped == {"usual": (8, "finished"), "long": (10, "finished")}
    assert [prompts for step, on, prompts in toy.base.read if on and step >= 8] == [[0]] * 2


BAD = {"name": "bad", "learning_rate": 1e30, "warmup_ratio": 0}
LIMIT = {"steps": 8, "tokens_per_step": 12, "max_skipped_updates": 2}


@pytest.mark.fault("loss is NaN on one rank only")
def test_a_diverged_prompt_is_stopped_alone(tmp_path):
    toy = Toy(tmp_path, [{"name": "good"}, BAD, {"name": "mlp", "method": "p_tuning"}])
    toy.run()
    assert toy.stopped["bad"] == (toy.config.training.max_skipped_updates + 1, "diverged")
    assert toy.stopped["good"] == toy.stopped["mlp"] == (8, "finished")
    assert "prompt 'bad': 5 updates in a row were not finite" in toy.out.getvalue()
    assert "lower its learning_rate" in toy.out.getvalue()
    without = Toy(tmp_path, [{"name": "good"}, {"name": "mlp", "method": "p_tuning"}]).run()
    for name in ("good", "mlp"):
        assert torch.equal(tokens(toy, name), tokens(without, name))
        assert toy.loop.progress.scores[name] == without.loop.progress.scores[name]


@pytest.mark.fault("loss is NaN on one rank only")
def test_a_run_fails_when_every_prompt_has_diverged(tmp_path):
    toy = Toy(tmp_path, [BAD, {**BAD, "name": "worse"}], training=LIMIT)
    with pytest.raises(Diverged, match=r"'bad', 'worse': 2 updates in a row .* no prompt is left"):
        toy.run()
    assert max(toy.saved) == 2, "the last checkpoint is from before"


def test_one_that_finished_before_the_last_diverged_is_a_result(tmp_path):
    toy = Toy(tmp_path, [{"name": "done", "steps": 1}, BAD], training=LIMIT).run()
    assert toy.stopped == {"done": (1, "finished"), "bad": (3, "diverged")}
    assert max(toy.saved) == 3


MANY = [{"name": f"x{i}", "learning_rate": 10.0**-i, "seed": i} for i in range(7)]
MANY += [{"name": f"y{i}", "task": "y", "learning_rate": 0.01 * (i + 1)} for i in range(2)]
MANY += [{"name": "brief", "steps": 2}]
HALVING = {
    "search": {"halving": {"eta": 3, "first": 2}},
    "training": {"steps": 9, "tokens_per_step": 12},
}


def test_halving_stops_the_worst_of_each_task_at_rungs(tmp_path):
    toy = Toy(tmp_path, MANY, **HALVING).run()
    at = {
        rung: {
            name for name, (step, why) in toy.stopped.items() if (step, why) == (rung, "halving")
        }
        for rung in (2, 6)
    }
    for task, sizes in (("x", (7, 3, 1)), ("y", (2, 1, 1))):
        on = {name for name in toy.bank.names if name.startswith(task)}
        for rung, before, after in zip((2, 6), sizes[:-1], sizes[1:], strict=True):
            losses = toy.losses(rung)
            assert len(on) == before
            kept = set(sorted(on, key=lambda name: losses[name])[:after])
            assert at[rung] & on == on - kept
            on = kept
        assert all(toy.stopped[name] == (9, "finished") for name in on)
    assert toy.stopped["brief"] == (2, "finished"), "one that is done is no rival"
    assert "x: halving keeps 3 of 7 prompts: " in toy.out.getvalue()
    assert max(len(p) for step, on, p in toy.base.read if on and step >= 6) == 2


def test_halving_compares_no_losses_of_different_teachers(tmp_path):
    toy = Toy(tmp_path, [{"name": name} for name in "abcd"], **HALVING)
    teachers = (None, None, "one text", "another")
    prompts = [
        prompt.model_copy(update={"teacher": teacher})
        for prompt, teacher in zip(toy.config.prompts, teachers, strict=True)
    ]
    toy.loop.validator.config = toy.config.model_copy(update={"prompts": prompts})
    toy.loop.progress.step = 2
    toy.loop.validator.halve(
        {k: {"validation_loss": loss} for k, loss in enumerate([1.5, 1.4, 0.1, 0.2])}
    )
    assert list(toy.stopped) == ["a"]


def test_tokens_are_counted_for_each_prompt(tmp_path):
    toy = Toy(tmp_path, [{"name": "long"}, {"name": "short", "steps": 2}])
    toy.run()
    read: dict[str | None, list[int]] = {}
    for name, count in toy.tokens:
        read.setdefault(name, []).append(count)
    assert read["long"][-1] + read["short"][-1] == read[None][-1] == toy.loop.progress.useful_tokens
    assert 0 < read["short"][-1] < read["long"][-1]
    assert read["long"] == sorted(read["long"])


@pytest.mark.parametrize("step", [1, 2, 5, 6])
def test_a_resumed_search_equals_an_uninterrupted_one(tmp_path, step):
    uninterrupted = Toy(tmp_path, MANY, **HALVING).run()
    resumed = Toy(tmp_path, MANY, **HALVING).resume(uninterrupted.saved[step]).run()
    assert resumed.stopped == uninterrupted.stopped
    assert resumed.saved[9][0] == uninterrupted.saved[9][0]
    after = [entry[:2] for entry in uninterrupted.logged if entry[0] > step]
    assert [entry[:2] for entry in resumed.logged if entry[0] > 0] == after
    assert resumed.losses(9) == uninterrupted.losses(9)
    gap = "generalization_gap"
    curves, expected = (
        [m[gap] for at, _, m in toy.logged if at > step and gap in m]
        for toy in (resumed, uninterrupted)
    )
    assert curves == expected


def test_hours_of_ranks_are_those_of_every_start(tmp_path):
    toy = Toy(tmp_path, [{"name": "p"}]).run()
    state = json.loads(toy.saved[5][1])["loop"]
    own = sum(state["progress"]["phase_seconds"].values())
    assert state["progress"]["rank_seconds"] == pytest.approx(own, abs=0.1)
    state["progress"] |= {"phase_seconds": {"training": 100.0}, "rank_seconds": 800.0}
    resumed = Toy(tmp_path, [{"name": "p"}]).loop
    resumed.load_state_dict(state)
    resumed.times.add({"training": 50.0})
    resumed.engine.world_size = 2
    assert resumed.accounting.rank_seconds == pytest.approx(900, abs=20)
    del state["progress"]["rank_seconds"]
    resumed.load_state_dict(state)
    assert resumed.state_dict()["progress"]["rank_seconds"] > 200


def test_prompts_read_their_own_rows_after_their_order_in_the_run_file_has_changed(tmp_path):
    prompts = [{"name": "short", "steps": 3}, {"name": "long"}]
    whole = Toy(tmp_path, prompts).run()
    resumed = Toy(tmp_path, prompts[::-1]).resume(whole.saved[5]).run()
    assert resumed.loop.batches.state_dict() == whole.loop.batches.state_dict()[::-1]
    assert resumed.losses(8) == pytest.approx(whole.losses(8))


@pytest.mark.fault("stop signal while loading, in the first step or during validation")
@pytest.mark.parametrize("where", ["in a step", "in a validation", "in the first step"])
def test_a_stopped_run_saves_and_resumes_equal_to_an_uninterrupted_one(
    tmp_path, monkeypatch, where
):
    """Halving too: what a validation that was cut short would have decided is decided later."""
    uninterrupted = Toy(tmp_path, MANY, **HALVING).run()
    toy = Toy(tmp_path, MANY, **HALVING, checkpoint={"every": 1000})
    step = 1 if where == "in the first step" else 2  # at step 2 there is a rung
    asked = 0

    def stop_requested() -> bool:
        nonlocal asked
        if toy.loop.progress.step == step and toy.loop.progress.unjudged:  # while validating
            asked += 1
            return where == "in a validation" and asked > 1
        return where != "in a validation" and toy.loop.progress.step == step - 1 and _training(toy)

    monkeypatch.setattr("trainer.runtime.stop_signals.stop_requested", stop_requested)
    with pytest.raises(Stopped):
        toy.run()
    monkeypatch.undo()
    assert list(toy.saved) == [step]
    resumed = Toy(tmp_path, MANY, **HALVING).resume(toy.saved[step]).run()
    assert resumed.stopped == uninterrupted.stopped
    assert resumed.saved[9][0] == uninterrupted.saved[9][0]
    assert resumed.losses(9) == uninterrupted.losses(9)


def _training(toy: Toy) -> bool:
    return bool(toy.base.read) and toy.base.read[-1][1]


def test_gaps_are_logged_with_every_validation(tmp_path):
    toy = Toy(tmp_path, [{"name": "one"}, {"name": "two", "num_virtual_tokens": 3}]).run()
    for first, last in ((1, 4), (5, 8)):
        for name in ("one", "two"):
            lines = [(at, m) for at, who, m in toy.logged if who == name]
            train = [m["train_loss"] for at, m in lines if first <= at <= last if "train_loss" in m]
            (scores,) = [m for at, m in lines if at == last and "validation_loss" in m]
            mean = sum(train) / len(train)
            assert len(train) == 4
            assert scores["generalization_gap"] == pytest.approx(scores["validation_loss"] - mean)
            assert scores["shift_gap"] == 0.0, "the same rows"
            assert not any(key.endswith("standard_error") for key in scores)
    scores = toy.loop.progress.scores["one"]
    assert scores["validation_loss_standard_error"] > 0
    assert math.isfinite(scores["generalization_gap"])


def test_the_best_prompts_of_two_lengths_are_scored_on_train_rows_at_the_end(tmp_path):
    prompts = [{"name": "one"}, {"name": "worse", "learning_rate": 1e-6}]
    prompts += [{"name": "three", "num_virtual_tokens": 3}, {"name": "y", "task": "y"}]
    Toy(tmp_path, prompts, Predictions(tmp_path, print), evaluation={"train_rows": 3}).run()
    written = {path.stem for path in path_of(tmp_path, train_file("y")).parent.iterdir()}
    assert written == {"one", "three", "y"}
    for name in ("one", "three"):  # the rows of both splits are the same here
        records = list(read(path_of(tmp_path, train_file(name))))
        validated = {r["input"]: r["loss"] for r in read(path_of(tmp_path, name))}
        assert len(records) == 3
        assert [r["loss"] for r in records] == [
            pytest.approx(validated[r["input"]]) for r in records
        ]


def test_no_train_rows_are_scored_if_the_setting_is_zero(tmp_path):
    Toy(
        tmp_path, [{"name": "one"}], Predictions(tmp_path, print), evaluation={"train_rows": 0}
    ).run()
    assert not path_of(tmp_path, train_file("one")).exists()


def test_gaps_without_shifted_rows_or_train_losses():
    assert gaps({"validation_loss": 2.0}, 0.0, 0) == {}
    shifted = {"validation_loss": 2.0, "shifted_validation_loss": 2.5}
    assert gaps(shifted, 3.0, 2) == {"generalization_gap": 0.5, "shift_gap": 0.5}


def test_time_left_counts_validations(tmp_path: Path) -> None:
    toy = Toy(
        tmp_path,
        [{"name": "a"}, {"name": "b", "steps": 4}],
        training={"steps": 11, "tokens_per_step": 6},
        evaluation={"every": 3},
    )
    loop = toy.loop
    loop.progress.step, loop.progress.train_seconds = 2, 4.0
    # Baselines were read from the cache: half of the time of training on the rows of 2 prompts.
    loop.progress.useful_tokens = 50
    tokens = 2 * sum(rows.num_tokens for rows in loop.tasks["x"].evaluation.values())
    assert tokens == 2 * 2 * 8 * 4, "two words, the label and EOS"
    assert loop.accounting.seconds_left() == pytest.approx(18 + 5 * 4.0 * tokens / 50 / 2)
    loop.times.add({"baselines": 10.0})
    # 9 steps of 2 s; validations at 3, 4, 6, 9 and 11 of 2 prompts, where two baselines took 10 s
    assert loop.accounting.seconds_left() == pytest.approx(18 + 5 * 10)
    loop.progress.validations = 2
    loop.times.add({"validation": 1.0})
    assert loop.accounting.seconds_left() == pytest.approx(18 + 5 * 0.5)


def script(toy: Toy, scores: dict[int, list[tuple[float, float]]]) -> Toy:
    """Let each prompt have these (accuracy, loss) at its validations, one after the other."""
    for name, data in toy.loop.tasks.items():
        data.task = data.task.model_copy(update={"metric": "accuracy"})
        toy.loop.progress.baselines[name] = {"no_prompt": {}}
    left = {k: iter(pairs) for k, pairs in scores.items()}
    now: dict[tuple[int, int], tuple[float, float]] = {}

    def score(requests: Any, *_: Any) -> list[Scored]:
        step = toy.loop.progress.step
        for k in {request.prompt for request in requests}:
            now[step, k] = (0.1, 9.0) if k is None else next(left[k])
        scores_now = [now[step, request.prompt] for request in requests]
        return [Scored({"accuracy": accuracy, "loss": loss}) for accuracy, loss in scores_now]

    toy.loop.evaluator.score = score  # type: ignore[method-assign]
    return toy


def test_the_best_step_is_the_one_with_the_best_metric_then_the_lowest_loss(tmp_path, monkeypatch):
    """Not the one with the lowest loss: that of step 2 is half as accurate."""
    pairs = [(0.3, 0.1), (0.6, 2.0), (0.6, 1.0), (0.5, 0.2), (math.nan, 0.05), (0.6, 1.5)]
    sections = {"evaluation": {"every": 2}, "training": {"steps": 12, "tokens_per_step": 12}}
    toy = script(Toy(tmp_path, [{"name": "p"}], **sections), {0: pairs})
    kept: list[int] = []
    monkeypatch.setattr(toy.bank, "keep_best", lambda k: kept.append(toy.loop.progress.step))
    toy.run()
    assert kept == [2, 4, 6], "an adapter is kept where the metric has improved, or else the loss"
    assert toy.loop.validator.stopping["p"].best_step == 6
    scores = toy.loop.progress.scores["p"]
    assert (scores["validation_accuracy"], scores["validation_loss"]) == (0.6, 1.0)


@pytest.mark.parametrize(
    ("every", "last", "expected"),
    [(50, 60, [60]), (50, 75, [50, 75]), (3, 10, [3, 6, 10]), (1, 2, [1, 2]), (50, 7, [7])],
)
def test_no_validation_shortly_before_the_last(tmp_path, every, last, expected):
    sections = {"evaluation": {"every": every}, "training": {"steps": last}}
    toy = Toy(tmp_path, [{"name": "p"}], **sections)
    assert validation_steps(toy.config) == expected


def test_early_stopping_waits_for_the_metric(tmp_path):
    """The loss falls at every validation; the accuracy does not rise again."""
    sections = {"evaluation": {"every": 2, "early_stopping": {"patience": 2}}}
    pairs = [(0.6, 2.0), (0.5, 1.0), (0.55, 0.5)]
    toy = script(Toy(tmp_path, [{"name": "p"}], **sections), {0: pairs}).run()
    assert toy.stopped == {"p": (6, "early_stopping")}
    assert toy.loop.validator.stopping["p"].best_step == 2


def test_halving_keeps_the_most_accurate_then_the_lowest_loss_then_the_shortest(tmp_path):
    prompts = [{"name": f"p{i}", "num_virtual_tokens": n} for i, n in enumerate([4, 4, 3, 2, 2])]
    sections = {"search": {"halving": {"eta": 2, "first": 2}}, "evaluation": {"every": 100}}
    sections["training"] = {"steps": 3, "tokens_per_step": 12}
    pairs = [(0.9, 5.0), (0.5, 1.0), (0.5, 1.0), (0.5, 1.0), (0.4, 0.1)]
    toy = script(Toy(tmp_path, prompts, **sections), {k: [p, p] for k, p in enumerate(pairs)}).run()
    assert {n for n, (_, why) in toy.stopped.items() if why == "halving"} == {"p1", "p4"}
    assert "halving keeps 3 of 5 prompts: p0, p3, p2\n" in toy.out.getvalue()


def test_a_checkpoint_of_a_version_that_ranked_by_loss_is_resumed(tmp_path):
    """Its early stopping has a loss; what the adapter is worth follows from its scores."""
    sections = {"evaluation": {"every": 2}}
    pairs = [(0.3, 0.1), (0.6, 2.0), (0.2, 0.05), (0.6, 3.0)]
    first = script(Toy(tmp_path, [{"name": "p"}], **sections), {0: pairs}).run()
    tensors, state = first.saved[2]
    old = json.loads(state)
    old["loop"]["stopping"]["p"]["best"] = 0.1
    toy = script(Toy(tmp_path, [{"name": "p"}], **sections), {0: pairs[1:]})
    toy.resume((tensors, json.dumps(old)))
    assert toy.loop.validator.stopping["p"].best == (-0.3, 0.1)
    toy.run()
    assert toy.loop.validator.stopping["p"].best_step == 4


def test_predictions_are_those_of_the_best_step_also_after_a_resume(tmp_path, monkeypatch):
    sections = {"evaluation": {"every": 2}}
    pairs = [(0.3, 1.0), (0.6, 1.0), (0.5, 1.0), (0.4, 1.0)]

    def toy(scores: list[tuple[float, float]]) -> Toy:
        predictions = Predictions(tmp_path, pytest.fail)
        return script(Toy(tmp_path, [{"name": "p"}], predictions, **sections), {0: scores})

    path = path_of(tmp_path, "p")
    uninterrupted = toy(pairs).run()
    assert step_of(path) == uninterrupted.loop.validator.stopping["p"].best_step == 4
    baseline = path_of(tmp_path, baseline_file("x", "no_prompt"))
    assert step_of(baseline) == 0, "not there before, so scored at the end"

    before = path.stat().st_ino
    toy(pairs[3:]).resume(uninterrupted.saved[6]).run()
    assert path.stat().st_ino == before, "the best step was before the resume"

    for damage in (path.unlink, lambda: path.write_text('{"step": 6, "row": 1}')):
        damage()
        again = toy([pairs[3], pairs[1]])
        given: list[SoftPrompt] = []
        score = again.loop.evaluator.score

        def scored(requests: Any, tokens: Any, *_: Any, score=score, given=given) -> list[Scored]:
            given[:] = tokens
            return score(requests, tokens)

        monkeypatch.setattr(again.loop.evaluator, "score", scored)
        again.resume(uninterrupted.saved[6]).run()
        assert step_of(path) == 4
        assert torch.equal(given[0].tensor, uninterrupted.bank.best(0).tensor), (
            "scored again as of the best step"
        )
