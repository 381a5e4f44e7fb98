"""On a CUDA device: a training step of every family, and the parts of a run, as on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.unsharded_base import CPU, load_unsharded
from tests.family_bases import CASES, errors, save_family
from tests.packed_step import IN_BF16, OUTLIERS, PRODUCTS, PackedStep
from tests.parts_of_a_run import LSTM, PROMPTS, answered, trained
from trainer.config import PROJECT_ROOT
from trainer.model.layers.matmul_selection import unsupported_device, use_matmul

TINY = PROJECT_ROOT / "examples" / "tiny_base"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def float32() -> Iterator[None]:
    """cuDNN would round the inputs of convolutions to TF32."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


def differences(
    folder: Path,
    case: str,
    kind: str = "dequantize",
    *,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> tuple[float, float]:
    """Return how far loss and gradients are from those of the CPU in float32."""
    device = torch.device("cuda", 0)
    saved = save_family(folder, case)
    base = load_unsharded(saved, "int8")
    use_matmul(base, kind, OUTLIERS)
    step = PackedStep.of(case, base)
    expected, wanted = step.gradients(base, *step.on(CPU))
    there = load_unsharded(saved, "int8", checkpointing, dtype, device)
    use_matmul(there, kind, OUTLIERS)
    assert all(x.device == device for x in (*there.parameters(), *there.buffers()))
    loss, gradients = step.gradients(there, *step.on(device))
    found = [gradient.cpu() for gradient in gradients]
    return abs(float(loss) / float(expected) - 1), max(errors(found, wanted))


@pytest.mark.parametrize("case", CASES)
def test_every_family_takes_the_step_of_the_cpu(tmp_path: Path, case: str) -> None:
    """By attention in buckets (``engine.attention: sdpa``), from page-locked memory."""
    loss, gradient = differences(tmp_path, case)
    assert loss < 1e-4
    assert gradient < 1e-3


@pytest.mark.parametrize("case", IN_BF16)
def test_recomputed_layers_in_bfloat16(tmp_path: Path, case: str) -> None:
    loss, gradient = differences(tmp_path, case, dtype=torch.bfloat16, checkpointing=True)
    assert loss < 1e-2
    assert gradient < 0.2


@pytest.mark.parametrize(("case", "kind"), PRODUCTS)
def test_int8_products(tmp_path: Path, case: str, kind: str) -> None:
    if reason := unsupported_device(torch.device("cuda", 0)):
        pytest.skip(reason)
    loss, gradient = differences(tmp_path, case, kind, checkpointing=True)
    assert loss < 1e-2
    assert gradient < 0.1


@pytest.fixture
def on_both(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function's results on the CPU and on the device, by a base and its device."""
    monkeypatch.chdir(PROJECT_ROOT)
    device = torch.device("cuda", 0)

    def call(function: Any) -> list[Any]:
        return [function(load_unsharded(TINY, "int8", device=at), at) for at in (CPU, device)]

    return call


def test_a_run_ends_as_on_the_cpu(on_both: Any) -> None:
    expected, found = on_both(partial(trained, prompts=[*PROMPTS, LSTM]))
    assert max(errors(found["prompts"], expected["prompts"])) < 1e-3
    assert found["scores"][0] == pytest.approx(expected["scores"][0], rel=1e-3)
    assert found["texts"] == expected["texts"]
    (measured, *others), (wanted, *others_wanted) = found["inspected"], expected["inspected"]
    assert others == others_wanted
    for values, wanted_values in zip(measured, wanted, strict=True):
        assert values == pytest.approx(wanted_values, rel=1e-2, abs=1e-4)


def test_requests_are_answered_as_on_the_cpu(on_both: Any) -> None:
    expected, found = on_both(answered)
    assert found["texts"] == expected["texts"]
    assert found["nearest"] == expected["nearest"]
    for state, wanted in zip(found["states"], expected["states"], strict=True):
        assert state == pytest.approx(wanted, rel=1e-3, abs=1e-3)
