"""``python -m benchmarks.learning --quick``, from training to table."""

from __future__ import annotations

import pytest

from benchmarks.learning import ours, tiny_base
from tests import preloaded

pytestmark = pytest.mark.integration


def test_quick_runs_both_sides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        ours,
        "train",
        lambda path, environment: preloaded.start(
            *("trainer", str(path)),
            environ=environment,
            stdout=path.with_suffix(".log"),
            stderr=None,
        ),
    )
    tiny_base.main(["--quick", "--workers", "1"])
    output = capsys.readouterr().out
    for arm in ("ours, prefix_tuning", "ours, p_tuning, instruction known", "PEFT, LoRA"):
        assert f"| {arm} |" in output, output
