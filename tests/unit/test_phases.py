"""Seconds by phase: each second counts once."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.runtime import phases as module
from trainer.runtime.phases import PhaseTimes, breakdown, clock


def test_each_second_counts_for_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    times = PhaseTimes()
    times.add({"start": 4.0})
    now[0] = 0.25
    with times("saving"):
        now[0] += 1.0
        for _ in range(2):
            with times("training"):
                now[0] += 10.0
                with times("validation"):
                    now[0] += 5.0
        now[0] += 2.0
        with times("validation"):
            now[0] += 0.5
            assert times.seconds["training"] in (10.0, 20.0), "a running phase counts until now"
    now[0] += 0.5
    expected = {"start": 4.0, "saving": 3.0, "training": 20.0, "validation": 10.5, "other": 0.75}
    assert times.seconds == expected
    assert list(times.seconds) == list(expected)
    times.add({"training": 100.0, "other": 1.0})
    assert times.summary() == expected | {"training": 120.0, "other": 1.75, "total": 139.25}


def test_clock() -> None:
    assert [clock(5), clock(65.9), clock(3723)] == ["0:05", "1:05", "1:02:03"]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (
            {"start": 4.0, "data": 0.4, "training": 70.0},
            "1:14 = start 0:04 (5%) + training 1:10 (95%)",
        ),
        ({"training": 0.2}, "0:00"),
        (
            {"a": 1.5, "b": 1.5, "other": 1.0},
            "0:04 = a 0:02 (38%) + b 0:01 (37%) + other 0:01 (25%)",
        ),
        (
            {"training": 3600.0, "saving": 10.0},
            "1:00:10 = training 1:00:00 (100%) + saving 0:10 (0%)",
        ),
        ({"training": 2.0, "saving": 0.9}, "0:03 = training 0:03 (100%)"),
    ],
)
def test_breakdown(seconds: dict[str, float], expected: str) -> None:
    assert breakdown(seconds | {"total": sum(seconds.values())}) == expected


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1e5), min_size=1))
def test_the_shown_parts_add_up(seconds: dict[str, float]) -> None:
    text = breakdown(seconds | {"total": sum(seconds.values())})
    total, _, parts = text.partition(" = ")

    def to_seconds(shown: str) -> int:
        value = 0
        for part in shown.split(":"):
            value = 60 * value + int(part)
        return value

    found = re.findall(r"\w (\S+) \((\d+)%\)", parts)
    if found:
        assert to_seconds(total) == sum(to_seconds(shown) for shown, _ in found)
    assert sum(int(share) for _, share in found) == (100 if found else 0)
    assert all(shown != "0:00" for shown, _ in found)
