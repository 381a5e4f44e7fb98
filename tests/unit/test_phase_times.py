"""Seconds by phase: each second counts once."""

from __future__ import annotations

import pytest

from trainer import phase_times as module
from trainer.phase_times import PhaseTimes


def test_an_inner_phase_is_subtracted_from_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
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
