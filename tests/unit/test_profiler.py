"""``engine.profile`` on a toy run: the files, what they name, and which steps are recorded."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tests.unit.test_loop import Toy
from trainer.config.base import Profile
from trainer.training.profiler import Profiler


def profiled(toy: Toy, folder: Path, first: int, steps: int) -> Toy:
    settings = Profile(first=first, steps=steps)
    profiler = Profiler(settings, folder, 0, torch.device("cpu"), pytest.fail)
    toy.loop.callbacks.append(profiler)
    return toy


def events(folder: Path) -> list[str]:
    with gzip.open(folder / "profile-rank-0.json.gz", "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if "dur" in event]


@pytest.mark.parametrize(("first", "steps", "recorded"), [(1, 1, 1), (3, 2, 2), (7, 9, 2)])
def test_the_steps_are_recorded_with_their_operators(
    tmp_path: Path, first: int, steps: int, recorded: int
) -> None:
    """The run has 8 steps: at 7, two of the nine are left."""
    profiled(Toy(tmp_path, [{"name": "p"}]), tmp_path / "logs", first, steps).run()
    names = events(tmp_path / "logs")
    assert sum(name.startswith("ProfilerStep") for name in names) >= recorded
    assert {"aten::mean", "Optimizer.step#Muon.step"} <= set(names)
    assert names.count("Optimizer.step#Muon.step") == recorded
    assert "aten::" in (tmp_path / "logs" / "profile-rank-0.txt").read_text()


def test_a_profiled_run_has_the_same_results_and_a_resumed_one_records_no_step_twice(
    tmp_path: Path,
) -> None:
    plain = Toy(tmp_path, [{"name": "p"}]).run()
    traced = profiled(Toy(tmp_path, [{"name": "p"}]), tmp_path / "a", 3, 2).run()
    assert traced.saved[8][0] == plain.saved[8][0]
    resumed = profiled(Toy(tmp_path, [{"name": "p"}]), tmp_path / "b", 3, 2)
    resumed.resume(plain.saved[4]).run()
    assert not (tmp_path / "b").exists()
    late = profiled(Toy(tmp_path, [{"name": "p"}]), tmp_path / "c", 3, 2)
    late.resume(plain.saved[3]).run()
    assert events(tmp_path / "c").count("Optimizer.step#Muon.step") == 1


def test_a_first_step_after_the_last_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"engine.profile.first: 9 is after the last step"):
        Toy(tmp_path, [{"name": "p"}], engine={"profile": {"first": 9}})
