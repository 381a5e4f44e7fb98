"""Measured errors of a base model against direct computation; samples, warnings."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from benchmarks.random_base import llama_config, save_random
from benchmarks.unsharded_base import load_shard
from tests.family_bases import save_family
from trainer import config as run_file
from trainer.commands.inspect.__main__ import main
from trainer.commands.inspect.findings import show, warnings, weight_findings
from trainer.commands.inspect.losses import all_arms, settings
from trainer.commands.inspect.weights import (
    WeightError,
    int8_weights,
    measure_weights,
    stored_bytes,
)
from trainer.commands.prepare import prepare
from trainer.config import Base
from trainer.data.task_data import load_tasks
from trainer.model.checkpoint_files import open_base
from trainer.model.layers.linear import absmax_name
from trainer.model.layers.quantization import dequantize_rows
from trainer.runtime.console import Console

ROOT = Path(__file__).resolve().parents[2]
#: Wide enough for an outlier: no weight is beyond sqrt(K) times its row's root mean square.
WIDE = {"num_hidden_layers": 2, "intermediate_size": 1024}
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Tied and untied."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        tied: save_random(folder / str(tied), llama_config(**WIDE, tie_word_embeddings=tied))
        for tied in (True, False)
    }


def measured(folder: Path, **settings: str) -> dict[str, WeightError]:
    base = Base.model_validate({"model": str(folder), **settings})
    files = open_base(base)
    weights = int8_weights(files, base)
    read: list[int] = []
    errors = measure_weights(files, weights, read.append)
    assert sum(read) == stored_bytes(files, weights)
    return {error.name: error for error in errors}


def split(folder: Path, to: Path) -> Path:
    """The same base in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    to.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".json":
            (to / path.name).write_bytes(path.read_bytes())
    names = sorted(tensors)
    weight_map = {}
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, to / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))
    return to


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_errors_are_those_of_the_weights(
    bases: dict[bool, Path], tmp_path: Path, tied: bool, sharded: bool
) -> None:
    tensors = load_file(bases[tied] / "model.safetensors")
    folder = split(bases[tied], tmp_path / "two") if sharded else bases[tied]
    weights = measured(folder, embeddings="int8", head="int8")
    matrices = {name.removesuffix(".weight") for name, t in tensors.items() if t.dim() == 2}
    assert set(weights) == matrices
    assert ("lm_head" in weights) != tied
    for name, error in weights.items():
        weight = tensors[f"{name}.weight"].double()
        step = weight.abs().amax(1, keepdim=True) / 127
        difference = weight - (weight / step).round() * step
        assert error.relative_error == pytest.approx(
            float(difference.norm() / weight.norm()), rel=1e-3
        )
        worst = (difference.norm(dim=1) / weight.norm(dim=1)).max().item()
        assert error.largest_row_error == pytest.approx(worst, rel=1e-3)
        assert (error.shape, error.outlier_rows) == (tuple(weight.shape), 0)


@pytest.mark.parametrize("case", ["gpt2", "mixtral", "gpt_oss"])
def test_stacked_and_transposed_weights(tmp_path: Path, case: str) -> None:
    """Against what loading makes of the same files."""
    folder = save_family(tmp_path / "base", case)
    weights = measured(folder)
    exact = dict(load_shard(folder, quantization="none")[0].model.named_parameters())
    model = load_shard(folder)[0].model
    int8 = {name: p for name, p in model.named_parameters() if p.dtype == torch.int8}
    assert set(weights) == {name.removesuffix(".weight") for name in int8}
    assert case == "gpt2" or any(weight.dim() == 3 for weight in int8.values())
    for name, weight in int8.items():
        path, _, own = name.rpartition(".")
        scales = getattr(model.get_submodule(path), absmax_name(own))
        difference = exact[name] - dequantize_rows(weight, scales)
        error = weights[name.removesuffix(".weight")]
        relative = difference.norm() / exact[name].norm()
        assert error.relative_error == pytest.approx(relative.item(), rel=1e-4)
        worst = (difference.norm(dim=-1) / exact[name].norm(dim=-1)).max()
        assert error.largest_row_error == pytest.approx(worst.item(), rel=1e-4)


@pytest.fixture(scope="module")
def outlier(bases: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One weight of one row is a thousand times the others; another row is zero."""
    folder = split(bases[True], tmp_path_factory.mktemp("outlier") / "base")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if f"{DOWN}.weight" in tensors:
            tensors[f"{DOWN}.weight"][3, 5] = 100.0
            tensors[f"{DOWN}.weight"][7] = 0.0
            save_file(tensors, path, {"format": "pt"})
    return folder


def test_an_outlier_row_is_reported_with_a_warning(outlier: Path) -> None:
    errors = measured(outlier)
    assert {name for name, error in errors.items() if error.outlier_rows} == {DOWN}
    error = errors[DOWN]
    assert error.outlier_rows == 1
    assert 0.02 < error.relative_error < error.largest_row_error < 0.04
    weights = weight_findings(list(errors.values()))
    assert [group["name"] for group in weights["groups"]] == ["layer 0", "layer 1"]
    plain, bad = weights["groups"]
    assert plain["outlier_row_share"] == 0
    assert bad["outlier_row_share"] * sum(
        e.rows for e in errors.values() if e.group == "layer 1"
    ) == pytest.approx(1)
    assert (bad["worst_tensor"], bad["worst_tensor_error"]) == (DOWN, error.relative_error)
    together = [e for e in errors.values() if e.group == "layer 1"]
    squared = sum(e.squared_error / sum(o.squared_norm for o in together) for e in together)
    assert bad["relative_error"] == pytest.approx(squared**0.5)
    (messages,) = warnings({"embeddings": "keep", "head": "keep"}, weights, None)
    assert messages.startswith(f"layer 1: relative error up to {bad['relative_error']:.4f} in int8")
    assert "base.quantization=none" in messages


def test_an_int8_folder_has_no_errors_but_outliers(
    outlier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = Console(io.StringIO(), io.StringIO())
    prepare(Base.model_validate({"model": str(outlier)}), tmp_path / "int8", silent)
    out = tmp_path / "inspection.json"
    assert main([str(tmp_path / "int8"), "--model", f"--json={out}"]) == 0
    inspection = json.loads(out.read_text())
    assert inspection["base"]["stored_int8"] is True
    assert inspection["weights"]["relative_error"] is None
    assert {tensor["relative_error"] for tensor in inspection["weights"]["tensors"]} == {None}
    assert inspection["weights"]["groups"][1]["outlier_row_share"] > 0
    assert inspection["warnings"] == []
    stderr = capsys.readouterr().out
    assert "stored in int8, so there are no original weights" in stderr
    assert "relative error" not in stderr


def test_a_base_alone(
    bases: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "inspection.json"
    ends = ["base.embeddings=int8", "base.head=int8"]
    assert main([str(bases[False]), *ends, "--model", f"--json={out}"]) == 0
    inspection = json.loads(out.read_text())
    names = [group["name"] for group in inspection["weights"]["groups"]]
    assert names == ["embeddings", "layer 0", "layer 1", "head"]
    assert set(inspection) == {"schema", "base", "weights", "losses", "warnings"}
    assert (inspection["schema"], inspection["losses"]) == (1, None)
    errors = measured(bases[False], embeddings="int8", head="int8")
    assert {
        tensor["name"]: tensor["relative_error"] for tensor in inspection["weights"]["tensors"]
    } == {name: error.relative_error for name, error in errors.items()}
    stderr = capsys.readouterr().out
    assert f"all numbers: {out}" in stderr
    assert len([line for line in stderr.splitlines() if "layer" in line]) == 2
    assert main([str(bases[False]), *ends, "--model", "--json=-"]) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out) == inspection
    assert "weights of" in streams.err


def test_a_nan_weight_is_named(
    bases: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = split(bases[True], tmp_path / "nan")
    path = next(p for p in folder.glob("*.safetensors") if f"{DOWN}.weight" in load_file(p))
    tensors = load_file(path)
    tensors[f"{DOWN}.weight"][0, 0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    assert main([str(folder), "--model"]) == 2
    assert f"{path}: '{DOWN}.weight' holds NaN" in capsys.readouterr().err


# Which rows are scored


@pytest.fixture(scope="module")
def quickstart() -> Any:
    config = run_file.load(ROOT / "examples" / "quickstart.yaml")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_base")
    return config, load_tasks(config, tokenizer, 512, 10_000, splits=("validation",))


def test_all_prompts_of_a_task_read_the_same_rows(quickstart: Any) -> None:
    config, tasks = quickstart
    groups = all_arms(config, tasks, ["animals", "triage"], 16)
    assert [(r.task, r.kind, r.prompt) for r in groups] == [
        *[("triage", kind, None) for kind in ("no_prompt", *["hand_written"] * 3)],
        ("triage", "trained", 1),
        *[("animals", kind, None) for kind in ("no_prompt", *["hand_written"] * 3)],
        ("animals", "trained", 0),
    ]
    chosen = {r.task: [c[0].row for c in r.rows.candidates] for r in groups[::-1]}
    for reader in groups:
        assert [c[0].row for c in reader.rows.candidates] == chosen[reader.task]
        assert len(reader.rows.gold) == 16
    again = all_arms(config, tasks, [], 16)
    assert [c[0].row for c in again[0].rows.candidates] == chosen["triage"]
    training = config.training.model_copy(update={"seed": 1})
    other = all_arms(config.model_copy(update={"training": training}), tasks, [], 16)
    assert [c[0].row for c in other[0].rows.candidates] != chosen["triage"]


def test_the_right_answers_stay_with_their_rows(quickstart: Any) -> None:
    config, tasks = quickstart
    eval_set, sample = (
        tasks["triage"].evaluation["validation"],
        all_arms(config, tasks, [], 16)[0].rows,
    )
    right = dict(zip([c[0].row for c in eval_set.candidates], eval_set.gold, strict=True))
    assert sample.gold == [right[c[0].row] for c in sample.candidates]
    every = all_arms(config, tasks, [], 10**6)[0].rows
    assert (list(every.candidates), every.gold) == (list(eval_set.candidates), eval_set.gold)


def test_nothing_is_generated(quickstart: Any) -> None:
    config, tasks = quickstart
    assert {r.rows.task.metric for r in all_arms(config, tasks, [], 4)} == {"accuracy"}
    data = tasks["triage"]
    free = data.task.model_copy(update={"metric": "execution", "choices": None})
    rows = data.evaluation["validation"]
    try:
        data.evaluation["validation"] = type(rows)(
            free, "validation", rows.rows, rows.candidates, rows.gold
        )
        assert all_arms(config, tasks, [], 4)[0].rows.task.metric == "loss"
    finally:
        data.evaluation["validation"] = rows


def test_settings_are_all_ways_that_the_run_file_knows() -> None:
    names = [setting.name for setting in settings()]
    assert names[:3] == ["none", "int8/dequantize", "int8/int8"]
    assert not any("auto" in name for name in names)
    base = Base.model_validate({"model": "m", "embeddings": "int8", "matmul": "int8"})
    plain = settings()[0].base(base)
    assert (plain.quantization, plain.matmul, plain.embeddings) == ("none", "dequantize", "keep")


# What is worth a warning


def losses(before: float, exact: float | None, fast: float | None) -> dict[str, Any]:
    names = {"none": before, "int8/dequantize": exact, "int8/int8": fast}
    return {
        "reference": "none",
        "settings": [
            {"name": name, "matmul": name.partition("/")[2] or None, "left_out": None}
            for name in names
        ],
        "readers": [
            {
                "task": "t",
                "kind": "trained",
                "name": "p",
                "rows": 4,
                "scores": {name: {"loss": loss} for name, loss in names.items()},
            }
        ],
    }


@pytest.mark.parametrize(
    ("values", "differences"),
    [
        ((1.0, 1.009, 0.991), []),
        ((0.01, 0.0105, 0.0109), []),  # far in relative terms, nothing in nats
        ((1.0, 1.02, 1.0), ["int8/dequantize differs by +2.0% from none"]),
        ((1.0, 1.0, 0.97), ["int8/int8 differs by -3.0% from none"]),
        ((1.0, 1.0, None), ["int8/int8 differs by +inf% from none"]),
    ],
)
def test_changed_losses_are_warned_of(values: Any, differences: list[str]) -> None:
    base = {"embeddings": "keep", "head": "int8"}
    warned = warnings(base, {"groups": []}, losses(*values))
    assert len(warned) == len(differences)
    for text, expected in zip(warned, differences, strict=True):
        assert text.startswith("task t, trained: p: ")
        assert expected in text
        exact = "dequantize differs" in expected
        remedy = "base.head=keep or base.quantization=none" if exact else "base.matmul=dequantize"
        assert text.endswith(f"remedy: {remedy}")


def test_a_skipped_setting_is_reported_with_its_reason() -> None:
    measured_losses = losses(1.0, 1.0, 1.0)
    measured_losses["settings"][2]["left_out"] = "base.matmul: int8 is not supported here"
    del measured_losses["readers"][0]["scores"]["int8/int8"]
    weights = {"groups": [], "relative_error": 0.0, "outlier_ratio": 20.0}
    base = {"model": "m", "stored_int8": False, "embeddings": "keep", "head": "keep"}
    out, err = io.StringIO(), io.StringIO()
    inspection = {
        "base": base,
        "weights": weights,
        "losses": measured_losses,
        "warnings": ["look here"],
    }
    show(inspection, Console(out, err))
    assert "int8/int8: left out: base.matmul: int8 is not supported here" in out.getvalue()
    assert "warning: look here" in err.getvalue()
    assert warnings(base, weights, measured_losses) == []
