"""The GPU check's base, its runner of parts, and its report."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import runner
from benchmarks.gpu_check.int8_base import linear_shapes, make_int8_base
from benchmarks.gpu_check.report import page, summarize
from benchmarks.gpu_check.sizes import SHAPE, SMALL_SHAPE
from benchmarks.unsharded_base import load_unsharded
from trainer.model.layers.linear import FrozenLinear


def test_the_base_has_8_bits_and_the_given_shape(tmp_path: Path) -> None:
    make_int8_base(tmp_path / "base", SMALL_SHAPE)
    base = load_unsharded(tmp_path / "base", "int8")
    linear = [module for module in base.modules() if isinstance(module, FrozenLinear)]
    in_layers = [module for module in linear if module.absmax is not None]
    shapes = list(linear_shapes(SMALL_SHAPE).values())
    assert [tuple(module.weight.shape) for module in in_layers] == 2 * shapes
    for module in in_layers:
        assert module.weight is not None
        assert module.absmax is not None
        weight = module.weight * module.absmax[:, None] / 127
        assert float(weight.square().mean() * module.in_features) == pytest.approx(1, rel=0.05)


class TestParts:
    """Outcomes of parts, with a fake start of their processes."""

    def run(
        self, tmp_path: Path, codes: dict[str, int | None], seconds: float = 1000
    ) -> dict[str, Any]:
        def start(module: str, arguments: Sequence[str], log: Path, limit: float) -> int | None:
            assert module == "benchmarks.gpu_check.part"
            name, folder, *_ = arguments
            log.write_text("Traceback\nRuntimeError: no kernel\n")
            (Path(folder) / f"{name}.json").write_text(json.dumps({"rows": []}))
            return codes.get(name, 0)

        records = runner.run_parts(
            tmp_path, [p.name for p in runner.PARTS], small=False, seconds=seconds, start=start
        )
        return {record["name"]: record for record in records}

    def test_failures_do_not_end_the_check(self, tmp_path: Path) -> None:
        codes = {"card": -signal.SIGSEGV, "products": 1, "attention": None}
        records = self.run(tmp_path, codes)
        assert list(records) == [part.name for part in runner.PARTS]
        outcome = {name: (r["status"], r["reason"]) for name, r in records.items()}
        assert outcome["card"] == ("failed", "killed by SIGSEGV")
        assert outcome["products"] == ("failed", "RuntimeError: no kernel")
        assert outcome["attention"] == ("timed out", "ended after 75 s")
        assert outcome["out_of_memory"] == ("passed", None)
        assert records["products"]["result"] == {"rows": []}, "what was measured before it failed"
        assert records["products"]["log"] == ["Traceback", "RuntimeError: no kernel"]

    def test_parts_without_what_they_need_are_skipped(self, tmp_path: Path) -> None:
        records = self.run(tmp_path, {"base": 1})
        skipped = [name for name, record in records.items() if record["status"] == "skipped"]
        assert skipped == [part.name for part in runner.PARTS if part.needs == "base"]
        assert records["train_bank"]["reason"] == "it needs the part base"

    def test_parts_without_time_are_skipped(self, tmp_path: Path) -> None:
        records = self.run(tmp_path, {}, seconds=runner.LEAST_SECONDS / 2)
        assert {record["status"] for record in records.values()} == {"skipped"}
        assert records["card"]["reason"] == "no time left of 8 s"


def test_a_process_is_killed_after_its_limit(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert runner.start_process("timeit", ["-n", "1", "-r", "1", "while 1: pass"], log, 0.3) is None
    assert runner.start_process("platform", [], log, 60) == 0
    assert "Linux" in log.read_text()


def test_shares_of_the_roofline_and_failures_are_reported() -> None:
    run = {
        "prompts": 1,
        "tokens_per_step": 16_384,
        "useful_tokens_per_second": 1000.0,
        "step_seconds": 0.5,
        "train_loss": 1.0,
        "base_bytes_per_rank": 10**9,
        "peak_gpu_bytes": None,
        "stream_tokens": 4096,
        "load_seconds": 3.0,
    }
    card = {
        "card": "A Card",
        "versions": {"torch": "2"},
        "flops_per_second": {"bf16": 4e14, "int8": 8e14},
    }
    results: dict[str, Any] = {
        "card": card,
        "train_bank": run | {"prompts": 16},
        "train_one": run | {"useful_tokens_per_second": 500.0},
        "train_flex": None,
    }
    records = [
        {
            "name": name,
            "about": "",
            "status": "passed" if result else "failed",
            "seconds": 1.0,
            "reason": None if result else "no | kernel",
            "result": result,
            "log": [],
        }
        for name, result in results.items()
    ]
    report = summarize(records, SHAPE, 9.0)
    assert report["card"] == "A Card"
    assert report["linear_parameters"] == pytest.approx(6.98e9, rel=1e-3)
    share = 4 * report["linear_parameters"] * 1000 / 4e14
    assert results["train_bank"]["share_of_bf16_roofline"] == pytest.approx(share)
    assert results["train_bank"]["share_of_int8_roofline"] == pytest.approx(share / 2)
    text = page(report)
    assert "Not passed: train_flex." in text
    assert "| train_flex |  | failed | 1 | no / kernel |" in text
    assert "| train_bank | 16 | 16,384 | 1,000 | 0.500 | 0.07 | 0.03 |" in text
    assert "16 prompts in one run: 2.00 times" in text


def test_selected_parts_bring_what_they_need() -> None:
    assert command.selected(["train_bank", "tests"]) == ["card", "tests", "base", "train_bank"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "finds no GPU"),
        (["--small"], "--small needs --out"),
        (["--minutes", "0"], "must be positive"),
    ],
)
def test_wrong_arguments_exit_with_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
