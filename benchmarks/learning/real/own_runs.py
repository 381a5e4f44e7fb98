"""This trainer's arms: ``promptshard train`` with a run file that sets task, method and place.

The run validates on held-out training rows and keeps the prompt of the best step. Then
``promptshard evaluate`` scores it on the validation rows.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.learning.real.cells import Cell
from trainer.commands.evaluate.store import PredictionStore
from trainer.config import RunConfig
from trainer.config.training import Evaluation
from trainer.evaluation import prediction_files

ROOT = Path(__file__).resolve().parents[3]
#: Settings of each arm's prompt. The base is int8 with all defaults, unless ``BASES`` has the arm.
OURS: dict[str, dict[str, Any]] = {
    "ours, prompt_tuning, system": {"method": "prompt_tuning", "position": "system"},
    "ours, prompt_tuning, front": {"method": "prompt_tuning", "position": "front"},
    "ours, prefix_tuning, system": {"method": "prefix_tuning", "position": "system"},
    "ours, prefix_tuning, front": {"method": "prefix_tuning", "position": "front"},
    "ours, p_tuning, system": {"method": "p_tuning", "position": "system"},
    "ours, p_tuning, front": {"method": "p_tuning", "position": "front"},
}
#: Arms that compare how the base is stored and multiplied with "ours, prompt_tuning, system", which
#: has the default (int8, on CPUs with integer products int8 products).
BASES: dict[str, dict[str, Any]] = {
    "base in 16 bits": {"quantization": "none"},
    "base in int8, exact products": {"matmul": "dequantize"},
    "base in int8, int8 products of two terms": {"matmul": "int8x2"},
    "base in int8, int8 products but outliers": {"matmul": "int8_outliers"},
}
OURS |= dict.fromkeys(BASES, OURS["ours, prompt_tuning, system"])


def run_sections(
    cells: Sequence[Cell], task: Mapping[str, Any], base: str, output_dir: str
) -> dict[str, Any]:
    """Return the run file that trains the cells' prompts in one bank; cells differ in the arm."""
    first = cells[0]
    return {
        "output_dir": output_dir,
        "base": {"model": base, **BASES.get(first.arm, {})},
        "tasks": [dict(task)],
        "prompts": [
            {"name": f"prompt-{i}", "task": first.task, "seed": cell.seed, **OURS[cell.arm]}
            for i, cell in enumerate(cells)
        ],
        "training": {"steps": first.steps, "tokens_per_step": first.tokens_per_step},
        "checkpoint": {"every": first.steps},
        "tracking": {"system_metrics": False},
    }


def validated_steps(steps: int) -> list[int]:
    """Steps after which a prompt is scored on the held-out rows: the trainer's default."""
    return sorted(Evaluation().validated(steps))


def settings_of(cell: Cell, task: Mapping[str, Any], digest: str) -> dict[str, Any]:
    """Return everything else that determines the result of a cell: resolved settings and rows."""
    values = run_sections([cell], task, "base", "output") | {"engine": {"attention": "sdpa"}}
    config = RunConfig.model_validate(values)
    return {
        "prompt": config.prompts[0].model_dump(mode="json", exclude={"name", "task", "seed"}),
        "base": config.base.model_dump(mode="json", exclude={"model"}),
        "init_share": config.search.init_share,
        "rows": digest,
        "text": task["hand_written"],
        **choice_of_step(cell.steps),
    }


def choice_of_step(steps: int) -> dict[str, Any]:
    """Settings of a cell whose step is chosen on held-out rows; nothing to choose: none."""
    validated = validated_steps(steps)
    return {"best_of_steps": validated} if len(validated) > 1 else {}


def train(
    cells: Sequence[Cell], run: dict[str, Any], validation: str, folder: Path
) -> list[dict[str, Any]]:
    """Train the cells in one run on one process; return their results on the validation rows."""
    output = Path(run["output_dir"])
    shutil.rmtree(output, ignore_errors=True)
    file = folder / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump(run, sort_keys=False, allow_unicode=True))
    log = _launch(folder, output.name, "train", str(file), "--processes", "1")
    scored = ("evaluate", str(output), "--data", validation, "--processes", "1")
    _launch(folder, f"{output.name}.evaluation", *scored)
    return [_result(output, log, i, run) for i in range(len(cells))]


def _launch(folder: Path, name: str, *arguments: str) -> str:
    """Run a command of this trainer; return what it printed."""
    log = folder / f"{name}.log"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "launch", *arguments]
    with log.open("wb") as lines:
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=lines, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        sys.exit(f"{log}:\n{log.read_text(errors='replace')[-3000:]}")
    return log.read_text(errors="replace")


def _result(output: Path, log: str, number: int, run: dict[str, Any]) -> dict[str, Any]:
    name = run["prompts"][number]["name"]
    summary = json.loads((output / "summary.json").read_text())
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    train_losses = [
        round(line["metrics"]["train_loss"], 4)
        for line in lines
        if line["prompt"] == name and "train_loss" in line["metrics"]
    ]
    task = run["prompts"][number]["task"]
    start = re.search(rf"^{name}: starts from (.*?):? '", log, re.MULTILINE)
    prompts = len(run["prompts"])
    return {
        "validation": _scores(output, task, name),
        "step": summary["prompts"][name]["best_step"],
        "baselines": {
            text: _scores(output, task, text) for text in ("no_prompt", "hand_written-1")
        },
        "train_losses": train_losses,
        "start": start[1] if start else "",
        "trained_parameters": _parameters(output, name),
        "text_tokens": summary["throughput"]["useful_tokens"] / prompts,
        "train_seconds": round(summary["throughput"]["train_seconds"] / prompts, 1),
        "time": {k: round(v / prompts, 2) for k, v in summary["time"].items() if k != "total"},
        "prompts_in_run": prompts,
        "useful_tokens_per_second": round(summary["throughput"]["useful_tokens_per_second"], 1),
    }


def _scores(output: Path, task: str, arm: str) -> dict[str, Any]:
    """Scores of a prompt or text on the validation rows, as this run stores the base."""
    records = list(prediction_files.read(PredictionStore(output).path(task, arm)))
    losses, labels = ([record[key] for record in records] for key in ("loss", "tokens"))
    correct = [int(record["correct"]) for record in records]
    return {
        "loss": sum(losses) / sum(labels),
        "accuracy": sum(correct) / len(correct),
        "losses": [round(loss, 4) for loss in losses],
        "labels": labels,
        "correct": correct,
    }


def _parameters(output: Path, name: str) -> int:
    """Number of trained parameters, from the last checkpoint."""
    from safetensors import safe_open

    (checkpoint,) = sorted((output / "checkpoints").glob("*/state.safetensors"))[-1:]
    with safe_open(checkpoint, "pt") as tensors:
        trained = [key for key in tensors.keys() if key.startswith(f"{name}/encoder/")]  # noqa: SIM118
        return sum(math.prod(tensors.get_slice(key).get_shape()) for key in trained)
