"""This trainer's arms: one run file with all tasks, methods and seeds, and default settings."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from examples import corpus

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning")
TITLES = {method: f"ours, {method}" for method in METHODS}
#: Run files in examples/ that define the tasks.
EXAMPLES = ("quickstart", "codegen")
#: Differs from the seed of the example files.
VALIDATION_SEED = 1


def tasks() -> list[dict[str, Any]]:
    """Return the tasks of the example run files."""
    sections = []
    for name in EXAMPLES:
        run = yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text())
        for task in run["tasks"]:
            task.pop("shifted_validation")
            sections.append(task)
    return sections


def run_file(
    folder: Path, budget: dict[str, Any], seeds: Sequence[int], *, with_text: bool
) -> tuple[Path, dict[str, str]]:
    """Write the run file; return its path, and each task's first hand-written instruction.

    ``with_text`` keeps all instructions in the tasks, as candidates for the initial tokens.
    """
    chosen = [task for task in tasks() if task["name"] in budget["tasks"]]
    texts = {task["name"]: task["hand_written"][0].strip() for task in chosen}
    for task in chosen:
        if not with_text:
            del task["hand_written"]
        task["validation"] = str(_validation(folder, task["name"], budget["validation_rows"]))
    prompts = [
        {
            "name": f"{task['name']}-{method}",
            "task": task["name"],
            "method": method,
            "init": "search",
            "sweep": {"seed": list(seeds)},
        }
        for task in chosen
        for method in METHODS
    ]
    run = {
        "output_dir": str(folder),
        "base": {"model": "examples/tiny_base", "quantization": "none"},
        "tasks": chosen,
        "prompts": prompts,
        "training": {"steps": budget["steps"], "tokens_per_step": budget["tokens_per_step"]},
        "evaluation": {"every": budget["every"]},
        "checkpoint": {"every": budget["steps"]},
        "tracking": {"system_metrics": False},
        # Search fully, although the default would not for so few steps: see the report.
        "search": {"max_prompts": len(prompts) * len(seeds), "init_share": 10},
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path, texts


def _validation(folder: Path, task: str, count: int) -> Path:
    """Write more validation rows than in the example files: 200 rows give 1-2 points of noise."""
    rows = corpus.task_rows(task, "valid", count, VALIDATION_SEED)
    path = folder.with_name(f"{folder.name}.{task}.jsonl")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def train(path: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start the only rank of ``promptshard train --processes 1``, without a launcher."""
    command = [sys.executable, "-m", "trainer", str(path)]
    with path.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def results(path: Path) -> list[dict[str, Any]]:
    """Return a finished run's prompts in the format of peers' results, with ``scores`` by step."""
    run = yaml.safe_load((path.with_suffix("") / "run.yaml").read_text())
    records = {
        prompt["name"]: {
            "arm": TITLES[prompt["method"]],
            "task": prompt["task"],
            "rate": None,
            "seed": prompt["seed"],
            "scores": {},
        }
        for prompt in run["prompts"]
    }
    for line in (path.with_suffix("") / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["prompt"] and "validation_loss" in row["metrics"]:
            records[row["prompt"]]["scores"][str(row["step"])] = {
                key.removeprefix("validation_"): value
                for key, value in row["metrics"].items()
                if key.startswith("validation_")
            }
    return list(records.values())
