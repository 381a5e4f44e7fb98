"""The lines that a validation prints: one per prompt, or one per task of a sweep."""

from __future__ import annotations

import io
from typing import Any

import pytest

from tests.unit.run_folder import small_config
from trainer.config import RunConfig
from trainer.runtime.console import Console
from trainer.training.validation_report import ValidationReport, some


class Data:
    """The parts of ``TaskData`` that the report reads."""

    def __init__(self, task: Any) -> None:
        self.task, self.evaluation = task, dict[str, Any]()


def report(
    count: int, metric: str = "accuracy", *, verbose: bool = False, **prompts: dict[str, Any]
) -> tuple[ValidationReport, io.StringIO]:
    settings = [{"name": f"p{i}", **prompts.get(f"p{i}", {})} for i in range(count)]
    config: RunConfig = small_config(metric, settings)
    console = Console(out := io.StringIO(), out)
    console.verbose = verbose
    tasks: Any = {task.name: Data(task) for task in config.tasks}
    return ValidationReport(config, tasks, console), out


def scores(*pairs: tuple[float, float]) -> dict[int, dict[str, float]]:
    return {
        k: {"validation_accuracy": accuracy, "validation_loss": loss}
        for k, (accuracy, loss) in enumerate(pairs)
    }


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_prompts_have_a_line_each(count):
    shown, out = report(count)
    shown.show(10, scores((0.5, 1.25), (0.75, 0.5)), range(count), {0: 5})
    lines = ["step 10  p0: accuracy 50.0%, loss 1.2500", "step 10  p1: accuracy 75.0%, loss 0.5000"]
    expected = [*lines[:count], "step 10  p0: stopped early, best at step 5"]
    assert out.getvalue().splitlines() == expected


def test_a_sweep_has_one_line_and_ties_are_ranked_by_loss():
    shown, out = report(4)
    shown.show(10, scores((0.5, 1.0), (0.75, 0.5), (0.75, 0.4), (0.25, 2.0)), range(4), {})
    assert out.getvalue() == (
        "step 10  t: accuracy best 75.0% (p2), median 62.5%, worst 25.0%; 4 of 4 still train\n"
    )


def test_verbose_prints_every_prompt_of_a_sweep():
    shown, out = report(4, verbose=True)
    shown.show(10, scores(*[(0.5, 1.0)] * 4), range(4), {3: 5})
    assert [line.split(":")[0] for line in out.getvalue().splitlines()] == [
        *(f"step 10  p{k}" for k in range(4)),
        "step 10  p3",
    ]


@pytest.mark.parametrize("count", [12, 64])
def test_many_prompts_that_stop_early_are_counted(count):
    shown, out = report(count)
    pairs = [(0.5, 1.0 + k) for k in range(count)]
    shown.show(40, scores(*pairs), [count - 1], dict.fromkeys(range(count - 1), 20))
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert "best 50.0% (p0)" in lines[0]
    assert lines[0].endswith(f"; 1 of {count} still train")
    assert lines[1] == (
        f"step 40  t: {count - 1} stopped early: p0 (best at step 20), p1 (best at step 20), "
        f"p2 (best at step 20), p3 (best at step 20) and {count - 5} more"
    )


def test_after_halving_the_others_are_counted_but_not_scored():
    shown, out = report(12)
    shown.show(30, {k: s for k, s in scores(*[(0.5, 1.0)] * 12).items() if k < 4}, range(4), {})
    assert "; 4 of 12 still train" in out.getvalue()


def test_scores_that_are_not_finite_are_counted():
    shown, out = report(3)
    nan = float("nan")
    shown.show(10, scores((0.5, 1.0), (nan, nan), (0.25, 2.0)), range(3), {})
    assert "best 50.0% (p0), median 37.5%, worst 25.0%; 1 not finite; 3 of 3" in out.getvalue()
    shown, out = report(3)
    shown.show(10, scores(*[(nan, nan)] * 3), range(3), {})
    assert out.getvalue() == "step 10  t: no finite score of 3 prompts; 3 of 3 still train\n"


def test_losses_against_different_teachers_are_in_different_lines():
    taught = {"objective": "distill", "teacher": "one"}
    shown, out = report(6, "loss", p3=taught, p4=taught, p5=taught)
    shown.show(10, scores(*[(0.5, float(k)) for k in range(6)]), range(6), {})
    assert out.getvalue().splitlines() == [
        "step 10  t: loss best 0.0000 (p0), median 1.0000, worst 2.0000; 3 of 3 still train",
        "step 10  t: KL divergence best 3.0000 (p3), median 4.0000, worst 5.0000; 3 of 3 still "
        "train",
    ]


def test_prompts_of_a_task_without_validation_have_no_line():
    shown, out = report(4)
    shown.show(10, {k: {} for k in range(4)}, range(4), {})
    assert out.getvalue() == ""


def test_halving_names_those_that_continue_and_verbose_all():
    pairs = scores(*[(k / 10, 1.0) for k in range(9)])
    stopped = {k: pairs[k] for k in range(3)}
    shown, out = report(9)
    shown.show_halving(20, "t", [8, 7, 6, 5, 4, 3], stopped)
    assert out.getvalue() == (
        "step 20  t: halving keeps 6 of 9 prompts: p8, p7, p6, p5 and 2 more\n"
    )
    shown, out = report(9, verbose=True)
    shown.show_halving(20, "t", [8, 7, 6, 5, 4, 3], stopped)
    assert out.getvalue() == (
        "step 20  t: halving keeps 6 of 9 prompts: p8, p7, p6, p5, p4, p3; "
        "stops p0 (0.0%), p1 (10.0%), p2 (20.0%)\n"
    )


def test_names_in_a_line():
    assert some(["a"]) == "a"
    assert some(list("abcd")) == "a, b, c, d"
    assert some(list("abcdef")) == "a, b, c, d and 2 more"


def test_a_terminal_breaks_lines_between_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    shown, out = report(3)
    monkeypatch.setattr(out, "isatty", lambda: True)
    shown._console = Console(out, out)
    shown.show(10, scores(*[(0.5, 1.0)] * 3), range(3), {})
    assert out.getvalue().splitlines() == [
        "step 10  t: accuracy best 50.0% (p0), median 50.0%, worst",
        "         50.0%; 3 of 3 still train",
    ]
