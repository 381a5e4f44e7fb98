"""What follows a failure under ``--max-restarts``: attempts that are functions over a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import restarts
from launch.exit_report import ExitReport

FAILED = ExitReport(1, "rank 1 was killed by SIGKILL")


class Attempts:
    """Each entry: the step it comes to, the checkpoint it leaves (or none), and how it ends."""

    def __init__(self, output: Path, *plan: tuple[int, int | None, ExitReport]) -> None:
        self.output, self.plan, self.fresh = output, list(plan), list[bool]()

    def __call__(self, fresh: bool) -> ExitReport:
        self.fresh.append(fresh)
        step, saved, ending = self.plan[len(self.fresh) - 1]
        with (self.output / "metrics.jsonl").open("a") as file:
            line = {"time": 1.0, "step": step, "metrics": {}}
            file.write(json.dumps(line) + "\n" + '{"step": 99')
            file.write("\n")
        if saved is not None:
            leave_checkpoint(self.output, saved)
        return ending


def leave_checkpoint(output: Path, step: int) -> Path:
    folder = output / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def attempts(tmp_path: Path) -> Callable[..., Attempts]:
    return lambda *plan: Attempts(tmp_path, *plan)


@pytest.mark.parametrize("ending", [ExitReport(0), ExitReport(2), ExitReport(75, "stopped")])
def test_success_bad_input_and_stop_are_not_restarted(attempts, ending):
    plan = attempts((5, None, ending))
    assert restarts.run(plan, plan.output, 3, fresh=False) == ending
    assert len(plan.fresh) == 1


def test_without_restarts_a_failure_is_passed_on(attempts, capfd):
    plan = attempts((5, 4, FAILED))
    assert restarts.run(plan, plan.output, 0, fresh=False) == FAILED
    assert capfd.readouterr().err == ""


def test_a_failed_run_restarts_from_its_checkpoint_with_a_message(attempts, capfd):
    plan = attempts((5, 4, FAILED), (9, 8, FAILED), (12, None, ExitReport(0)))
    assert restarts.run(plan, plan.output, 3, fresh=False) == ExitReport(0)
    stderr = capfd.readouterr().err
    assert stderr.count(f"error: {FAILED.message}\n") == 2
    assert "failed at step 5; restart 1 of 3: the run resumes from step-00000004" in stderr
    assert "failed at step 9; restart 2 of 3: the run resumes from step-00000008" in stderr


def test_restarts_are_bounded(attempts):
    plan = attempts((1, None, FAILED), (2, None, FAILED), (3, None, FAILED))
    ending = restarts.run(plan, plan.output, 2, fresh=False)
    assert (ending.code, len(plan.fresh)) == (1, 3)
    assert ending.message == f"{FAILED.message}; still failing after 2 restarts (--max-restarts=2)"


def test_a_second_failure_at_the_same_step_is_not_restarted(attempts):
    plan = attempts((5, 4, FAILED), (5, None, ExitReport(1)))
    ending = restarts.run(plan, plan.output, 9, fresh=False)
    assert ending == ExitReport(1, "failed twice at step 5 without progress: not restarted")


def test_the_same_step_with_a_new_checkpoint_is_progress(attempts):
    plan = attempts((5, 4, FAILED), (5, 5, FAILED), (5, None, FAILED))
    assert "failed twice at step 5" in restarts.run(plan, plan.output, 9, fresh=False).message
    assert len(plan.fresh) == 3


def test_an_earlier_run_is_archived_exactly_once(attempts, capfd):
    """The first attempt fails before it has put the earlier run aside, the second after it.

    The clock of the file system is not that of this host.
    """
    plan = attempts((0, None, FAILED), (3, 2, FAILED), (9, None, ExitReport(0)))
    earlier = leave_checkpoint(plan.output, 50)
    os.utime(earlier, (2.0, 2.0))

    def attempt(fresh: bool) -> ExitReport:
        if len(plan.fresh) == 1:
            earlier.rmdir()
        report = plan(fresh)
        for path in (plan.output / "checkpoints").iterdir():
            os.utime(path, (2.0, 2.0))
        return report

    assert restarts.run(attempt, plan.output, 5, fresh=True) == ExitReport(0)
    assert plan.fresh == [True, True, False]
    stderr = capfd.readouterr().err
    assert "restart 1 of 5: the run starts over" in stderr
    assert "restart 2 of 5: the run resumes from step-00000002" in stderr
