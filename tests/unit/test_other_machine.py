"""A trained prompt is used on a machine that lacks what the run was trained with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.saved_run import TINY, save_run
from trainer.config import load
from trainer.distributed.model_loading import _supported
from trainer.inference.opened_base import open_inference_base
from trainer.inference.saved_run import open_run
from trainer.model.layers import matmul_selection
from trainer.runtime.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]
#: What another rank reports.
NO_COMPILER = "base.matmul: int8 is not supported on a CPU without a C++ compiler; use auto"


def supported(settings: list[str], other_rank: tuple[str, str] = ("", "")) -> Any:
    """Return product and attention that are used on a CPU, and warnings."""
    config = load(ROOT / "examples/quickstart.yaml", settings)
    engine: Any = SimpleNamespace(
        device=torch.device("cpu"), all_gather=lambda found: [found, other_rank]
    )
    warnings: list[str] = []
    console: Any = SimpleNamespace(warn=warnings.append)
    used = _supported(engine, config, console)
    assert used.model_copy(update={"base": config.base, "engine": config.engine}) == config
    return used.base.matmul, used.engine.attention, warnings


@pytest.fixture(autouse=True)
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_selection, "why_not_on_cpu", lambda: None)


def test_settings_that_are_supported_stay() -> None:
    assert supported([]) == ("auto", "auto", [])
    settings = ["base.matmul=int8", "engine.attention=sdpa"]
    assert supported(settings) == ("int8", "sdpa", [])


def test_auto_replaces_what_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "without a C++ compiler (install g++)"
    monkeypatch.setattr(matmul_selection, "why_not_on_cpu", lambda: reason)
    matmul, attention, warnings = supported(["base.matmul=int8", "engine.attention=flex"])
    assert (matmul, attention) == ("auto", "auto")
    assert warnings[0] == f"base.matmul: int8 is not supported on a CPU {reason}; using auto"
    assert warnings[1].startswith("engine.attention: flex, but this machine computes on cpu")
    assert len(warnings) == 2


def test_all_ranks_use_the_same() -> None:
    used = supported(["base.matmul=int8", "engine.attention=sdpa"], (NO_COMPILER, ""))
    assert used == ("auto", "sdpa", [NO_COMPILER.replace("use auto", "using auto")])


def test_a_base_in_another_folder_is_to_be_written_into_the_run_file(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run")
    file = folder / "run.yaml"
    file.write_text(file.read_text().replace(str(TINY), "/cluster/tiny"))
    engine: Any = SimpleNamespace(run_on_all=lambda work: work())
    console: Any = None
    problem = f"{file}: base.model: /cluster/tiny does not exist on this machine; write the path"
    with pytest.raises(BadInput, match=problem):
        open_inference_base(engine, open_run(folder), console)
    file.write_text(file.read_text().replace("/cluster/tiny", str(TINY)))
    open_run(folder).check_base()
