"""``tracking.tensorboard``: the points are those of ``metrics.jsonl``, also after a resume."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.unit.test_loop import Toy
from trainer.runtime.errors import BadInput
from trainer.tracking import MetricsLog, TrackingClient
from trainer.tracking.metrics_callback import MetricsCallback
from trainer.tracking.metrics_log import METRICS_FILE, read_lines
from trainer.tracking.tensorboard_callback import TensorBoardCallback, check_tensorboard

#: (prompt, metric, step, value as TensorBoard stores it)
Point = tuple[str, str, int, float]


def tracked(folder: Path, saved: tuple[bytes, str] | None = None) -> Toy:
    """A run of 8 steps, perhaps resumed, that writes both kinds of files into ``folder``."""
    from torch.utils.tensorboard import SummaryWriter

    toy = Toy(folder, [{"name": "one"}, {"name": "two", "steps": 6}])
    if saved is not None:
        toy.resume(saved)
    log = MetricsLog(folder)
    log.rewind(toy.loop.progress.step)
    toy.loop.callbacks += [
        MetricsCallback(log, TrackingClient(folder), lambda text: None),
        TensorBoardCallback(folder, SummaryWriter, pytest.fail),
    ]
    return toy.run()


def logged(folder: Path) -> list[Point]:
    lines = [line for line, _ in read_lines(folder / METRICS_FILE) if line is not None]
    return sorted(
        (line.prompt or "", name, line.step, float(np.float32(value)))
        for line in lines
        for name, value in line.metrics.items()
        if math.isfinite(value)
    )


def shown(folder: Path) -> list[Point]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points = []
    for prompt in ("", "one", "two"):
        events = EventAccumulator(str(folder / "tensorboard" / prompt), {"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            points += [(prompt, tag, event.step, event.value) for event in events.Scalars(tag)]
    return sorted(points)


def test_the_points_are_those_of_the_metrics_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    toy = tracked(tmp_path)
    points = shown(tmp_path)
    assert points == logged(tmp_path)
    assert ("one", "validation_loss", 8) in {point[:3] for point in points}
    assert ("", "useful_tokens_per_second", 8) in {point[:3] for point in points}

    tracked(tmp_path, toy.saved[5])
    assert shown(tmp_path) == logged(tmp_path)
    places = [point[:3] for point in shown(tmp_path)]
    assert len(places) == len(set(places)), "no point is shown twice"
    assert len(places) == len(points)


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"tensorboard.*pip install tensorboard"):
        check_tensorboard()
