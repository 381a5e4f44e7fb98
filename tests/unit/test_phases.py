"""Seconds by phase: each second counts once."""

from __future__ import annotations

import pytest

from trainer.runtime import phases as module
from trainer.runtime.phases import PhaseTimes, breakdown, clock


def test_a_nested_phase_is_subtracted_from_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    times = PhaseTimes()
    times.add({"start": 4.0})
    with times("saving"):
        now[0] = 1.0
        for _ in range(2):
            with times("training"):
                now[0] += 10.0
                with times("validation"):
                    now[0] += 5.0
        now[0] += 2.0
        with times("validation"):
            now[0] += 0.5
    assert times.seconds == {"start": 4.0, "saving": 3.0, "training": 20.0, "validation": 10.5}
    times.add({"training": 100.0})
    assert times.summary()["total"] == 137.5


def test_breakdown() -> None:
    assert [clock(5), clock(65.9), clock(3723)] == ["0:05", "1:05", "1:02:03"]
    seconds = {"start": 4.0, "load": 0.4, "training": 70.0, "total": 74.4}
    assert breakdown(seconds) == "1:14 (start 0:04, training 1:10)"
