"""A run and the programs that use it, on two simulated devices that share a base.

Nothing is left on the host, and no tensor of the host is sent to other ranks, as NCCL requires.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import ROOT, run_module

PROGRAM = "tests.distributed.on_simulated_gpus"
SETTINGS = [
    str(ROOT / "examples" / "quickstart.yaml"),
    *(
        "engine.shard_group=world",
        "base.matmul=dequantize",
        "base.embeddings=int8",
        "base.head=int8",
    ),
    *("training.steps=3", "evaluation.every=3", "checkpoint.every=3"),
    *("tasks[0].max_validation_rows=30", "tasks[1].max_validation_rows=30"),
    *("prompts[0].method=prefix_tuning", "prompts[1].method=p_tuning"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on two simulated devices; return the output folder."""
    folder = tmp_path_factory.mktemp("simulated")
    return train(folder, PROGRAM, "trainer.__main__")


def train(folder: Path, module: str, *arguments: str) -> Path:
    output = folder / "out"
    settings = [*SETTINGS, f"output_dir={output}", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    run(folder, module, *arguments, *settings)
    return output


def run(folder: Path, module: str, *arguments: str) -> None:
    logs = [folder / f"rank-{rank}.log" for rank in range(2)]
    codes = run_module(module, *arguments, logs=logs)
    output = "\n".join(f"{log.name}:\n{log.read_text()[-5000:]}" for log in logs)
    assert codes == [0, 0], f"exit codes {codes}\n{output}"


def test_a_run_ends_as_on_the_cpu(trained: Path, tmp_path: Path) -> None:
    prompts, expected = (
        json.loads((output / "summary.json").read_text())["prompts"]
        for output in (trained, train(tmp_path, "trainer"))
    )
    assert prompts.keys() == expected.keys()
    for name, values in expected.items():
        assert prompts[name]["validation_loss"] == pytest.approx(
            values["validation_loss"], rel=1e-4
        ), name


@pytest.mark.parametrize(
    ("module", "options", "result"),
    [
        (
            "trainer.commands.evaluate.__main__",
            ["--shots=1", "--retrieved=1", "--retriever=cosine", "--knn=3", "--rows=10"],
            "evaluation.json",
        ),
        ("trainer.commands.inspect_prompts.__main__", ["--rows=10"], "inspection.json"),
    ],
)
def test_its_prompts_are_measured(
    trained: Path, tmp_path: Path, module: str, options: list[str], result: str
) -> None:
    run(tmp_path, PROGRAM, module, str(trained), *options)
    measured: dict[str, Any] = json.loads((trained / result).read_text())
    assert measured
