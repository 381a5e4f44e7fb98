"""A trained prompt is used on a machine that lacks what the run was trained with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.saved_run import TINY, save_run
from trainer.config import load
from trainer.distributed.model_loading import _checked, _supported
from trainer.inference.opened_base import as_trained, open_inference_base
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


def test_a_product_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before the base is loaded; inference uses another one."""
    engine: Any = SimpleNamespace(device=torch.device("cpu"), run_on_all=lambda work: work())
    warnings: list[str] = []
    console: Any = SimpleNamespace(warn=warnings.append)
    base = load(ROOT / "examples/quickstart.yaml", ["base.matmul=int8"]).base

    def used(only_inference: bool) -> str:
        shapes = [(48, 64)]
        return _checked(engine, base, base.matmul, shapes, torch.float32, console, only_inference)

    def build(*_: Any) -> Any:
        raise subprocess.CalledProcessError(1, ["gcc"])

    assert used(False) == used(True) == "int8"
    monkeypatch.setattr(torch, "_int_mm", build)
    with pytest.raises(BadInput, match=r"base\.matmul: int8 cannot run: .*gcc.*; use auto or"):
        used(False)
    assert used(True) == "dequantize"
    (warning,) = warnings
    assert warning.endswith("; using dequantize")


@pytest.mark.parametrize(
    ("device", "environment", "setting", "used"),
    [
        ("cuda", {"device": "NVIDIA L4", "matmul": "dequantize"}, "auto", "dequantize"),
        ("cuda", {"device": "NVIDIA L4", "matmul": "dequantize"}, "int8", "int8"),
        ("cuda", {"device": "NVIDIA L4", "matmul": "bitsandbytes"}, "auto", "auto"),
        ("cuda", {"device": "NVIDIA L4", "matmul": "int4"}, "auto", "auto"),
        ("cuda", {"device": "NVIDIA T4", "matmul": "dequantize"}, "auto", "auto"),
        ("cuda", None, "auto", "auto"),
        ("cpu", {"device": "cpu", "matmul": "int8"}, "auto", "auto"),
    ],
)
def test_a_timed_product_stays_that_of_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    environment: dict[str, str] | None,
    setting: str,
    used: str,
) -> None:
    """Timing differs between starts: the scores of a prompt must not."""
    if environment is not None:
        (tmp_path / "environment.json").write_text(json.dumps(environment))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(matmul_selection, "missing_library", lambda: "no module")
    config = load(ROOT / "examples/quickstart.yaml", [f"base.matmul={setting}"])
    engine: Any = SimpleNamespace(device=torch.device(device), run_on_main=lambda work: work())
    base = config.base.model_copy(update={"matmul": used})
    assert as_trained(engine, config, tmp_path) == config.model_copy(update={"base": base})


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
