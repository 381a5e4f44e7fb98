"""What ``promptshard evaluate`` refuses before the base is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.test_evaluate_arms import BASE, make_run
from trainer.commands.evaluate.options import Options, parse
from trainer.commands.evaluate.selection import check_data, selected_run
from trainer.config import dump
from trainer.prompts.adapter_files import WeightAdapter, read_adapter
from trainer.prompts.saved_prompts import SEGMENT, SETTINGS, WEIGHTS
from trainer.reporting.summary import SUMMARY_FILE
from trainer.runtime.errors import BadInput

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(BASE)}
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def run_folder(folder: Path, **task: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(dump(make_run(folder, **task)))
    return folder


def adapter(folder: Path, tensors: dict[str, tuple[int, int]] | None = None, **more: Any) -> Path:
    """Write an adapter: by default a LoRA of one layer."""
    folder.mkdir(exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(LORA | more))
    shapes = tensors or {f"{LAYER}.lora_A.weight": (2, 128), f"{LAYER}.lora_B.weight": (128, 2)}
    values = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(values, str(folder / WEIGHTS))
    return folder


def refused(folder: Path, **options: Any) -> str:
    given = Options(folder, **options)
    with pytest.raises(BadInput) as error:
        check_data(selected_run(given), given)
    return "\n".join(error.value.problems)


def test_a_run_is_selected(tmp_path: Path) -> None:
    run = selected_run(Options(run_folder(tmp_path), adapters=(str(adapter(tmp_path / "lora")),)))
    assert [prompt.name for prompt in run.prompts] == ["soft"]
    (weights,) = run.weight_adapters
    assert weights.layers["model.layers.0.self_attn.q_proj"]["lora_A"][1] == (2, 128)
    check_data(run)


def test_a_summary_of_a_newer_version(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (folder / SUMMARY_FILE).write_text('{"schema_version": 999, "status": "finished"}')
    assert "schema_version 999 is newer than" in refused(folder)


def test_unknown_names(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    problem = refused(folder, prompts=("sofd",), tasks=("diets",))
    assert f"--task: {folder} has no task 'diets' (did you mean 'diet'?); known: diet" in problem
    assert f"--prompt: {folder} has no prompt 'sofd' (did you mean 'soft'?); known: soft" in problem


def test_a_run_without_a_finished_prompt(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (folder / "prompts" / "soft" / WEIGHTS).unlink()
    assert "has no finished prompt; train the run to its end" in refused(folder)


def test_a_metric_that_does_not_suit_the_task(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, choices=None, metric="exact_match")
    assert "--metric: accuracy needs choices" in refused(folder, metric="accuracy")
    assert "--knn: kNN prompting predicts one of the choices" in refused(folder, knn=3)


def test_data_without_rows_or_for_no_task(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (empty := tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl: is empty; it has no rows" in refused(folder, data=str(empty))
    assert "missing.jsonl" in refused(folder, data=str(tmp_path / "missing.jsonl"))
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "x", "label": "wrong"}) + "\n")
    assert "wrong" in refused(folder, data=str(tmp_path / "other.jsonl"))


def write_long_rows(folder: Path) -> None:
    """Replace the train rows."""
    long = " ".join(["A lion sleeps in the grass."] * 20)
    rows = [{"text": f"{long} {number}.", "label": "meat"} for number in range(9)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("option", ["shots", "retrieved"])
def test_more_examples_than_the_context_holds(option: str, chat: bool, tmp_path: Path) -> None:
    settings = {"chat": True, "target": "{label}"} if chat else {}
    folder = run_folder(tmp_path, hand_written=[], **settings)
    write_long_rows(tmp_path)
    problem = refused(folder, **{option: 5})
    assert f"--{option} 5: 5 examples and the shortest row of task 'diet' have at least" in problem
    assert "but the context of the base holds 512; lower it (at most about" in problem
    fitting = int(problem.split("at most about ")[1].split()[0])
    assert 1 <= fitting < 5
    check = Options(folder, **{option: fitting})  # type: ignore[arg-type]
    check_data(selected_run(check), check)


@pytest.mark.parametrize("too_long", ["refuse", "skip", "truncate"])
def test_rows_that_are_longer_than_the_context(too_long: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, hand_written=[], too_long=too_long)
    data = tmp_path / "data.jsonl"
    row = {"text": "A lion sleeps in the grass. " * 200, "label": "meat"}
    data.write_text(json.dumps(row) + "\n")
    (tmp_path / "train.jsonl").write_text(data.read_text())  # nothing is left to draw
    given = {"shots": 3, "retrieved": 2, "data": str(data)}
    if too_long != "truncate":
        check = Options(folder, **given)  # type: ignore[arg-type]
        check_data(selected_run(check), check)  # the ranks report the rows
        return
    problem = refused(folder, **given)
    assert "--shots 3, --retrieved 2: the shortest row of task 'diet' has at least" in problem
    assert "the context of the base holds 512, and rows after examples are not trunc" in problem
    assert "lower it" not in problem


def test_examples_of_a_base_without_files_are_checked_by_the_ranks(tmp_path: Path) -> None:
    folder, given = run_folder(tmp_path), Options(tmp_path, shots=9)
    write_long_rows(folder)
    run = selected_run(given)
    base = run.config.base.model_copy(update={"model": "org/not-downloaded"})
    other = replace(run, config=run.config.model_copy(update={"base": base}))
    assert "at least" in refused(folder, shots=9)
    check_data(other, given)


def test_pickled_weights(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lora")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    problem = refused(run_folder(tmp_path), adapters=(str(folder),))
    assert "--adapter:" in problem
    assert "save it as safetensors: pickles can run code" in problem


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lora", base_model_name_or_path="org/other")
    with pytest.raises(BadInput, match=r"was trained for the base 'org/other'.*--force"):
        read_adapter(str(folder), str(BASE))
    assert isinstance(read_adapter(str(folder), str(BASE), force=True), WeightAdapter)


@pytest.mark.parametrize(
    ("settings", "tensors", "problem"),
    [
        ({"peft_type": "LOHA"}, None, "type LOHA are not supported; known: LORA, IA3"),
        ({"use_dora": True}, None, "use_dora: True of LORA is not supported; merge"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
        ({}, {"base_model.model.x.lora_embedding_A": (2, 3)}, "is not a LORA of a linear layer"),
        ({}, {f"{LAYER}.lora_A.weight": (2, 128)}, "lacks a tensor"),
    ],
)
def test_adapters_that_cannot_be_used(
    settings: Any, tensors: Any, problem: str, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "adapter", tensors, **settings)
    with pytest.raises(BadInput) as error:
        read_adapter(str(folder), str(BASE))
    assert problem in error.value.problems[0]


def test_an_adapter_with_text_around_its_virtual_tokens(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    inside = tmp_path / "prompts" / "soft"
    segment = {"before": [1], "num_virtual_tokens": 2, "after": [5]}
    (inside / SEGMENT).write_text(json.dumps(segment))
    assert "were trained inside text" in refused(folder, adapters=(str(inside),))


def test_the_ranks_get_the_same_options() -> None:
    options = Options(
        Path("runs/x"),
        ("a", "b"),
        data="-x.jsonl",
        adapters=("d e",),
        force=True,
        shots=3,
        select_on="half",
    )
    assert parse(options.arguments()) == options
