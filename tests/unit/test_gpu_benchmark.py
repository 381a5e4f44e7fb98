"""The GPU benchmark's own parts: its base is one that loads, and its table says what was found."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.unsharded_base import load_unsharded
from trainer.model.layers.linear import FrozenLinear


def test_the_base_is_in_8_bits_and_of_the_shape_it_says(tmp_path: Path) -> None:
    gpu.make_int8_base(tmp_path / "base", gpu.QUICK_SHAPE)
    base = load_unsharded(tmp_path / "base", "int8")
    linear = [module for module in base.modules() if isinstance(module, FrozenLinear)]
    in_layers = [module for module in linear if module.absmax is not None]
    shapes = list(gpu.linear_shapes(gpu.QUICK_SHAPE).values())
    assert [tuple(module.weight.shape) for module in in_layers] == 2 * shapes
    for module in in_layers:
        assert module.weight is not None
        assert module.absmax is not None
        weight = module.weight * module.absmax[:, None] / 127
        assert float(weight.square().mean() * module.in_features) == pytest.approx(1, rel=0.05)


def test_shares_of_the_roofline() -> None:
    arm = {
        "useful_tokens_per_second": 1000.0,
        "step_seconds": 0.5,
        "train_loss": 1.0,
        "base_bytes_per_rank": 10**9,
        "peak_gpu_bytes": None,
        "stream_tokens": 4096,
    }
    arms = {"int8-sdpa": dict(arm), "dequantize-flex": dict(arm), "int8-flex": {"failed": 2}}
    speeds = {"bf16": 4e14, "int8": 8e14}
    report = gpu.summary(gpu.SHAPE, 2, arms, speeds)
    assert report["linear_parameters"] == pytest.approx(6.98e9, rel=1e-3)
    share = 4 * report["linear_parameters"] * 1000 / 2 / 4e14
    assert arms["dequantize-flex"]["share_of_roofline"] == pytest.approx(share)
    assert arms["int8-sdpa"]["share_of_int8_roofline"] == pytest.approx(share / 2)
    lines = gpu.table(report).splitlines()
    assert any(line.startswith("| int8-sdpa | 1,000 | 0.500 | 0.03 | 0.02 |") for line in lines)
    assert any(line.startswith("| int8-flex | failed with exit code 2 |") for line in lines)
