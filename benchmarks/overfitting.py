"""Overfitting of prompts of two lengths on SmolLM2: train rows, new rows, and rows on other drugs.

    promptshard example smollm2 work --prepare    # once, for the base model and the rows
    python -m benchmarks.overfitting work

Trains one prompt for every length and seed on the question ``condition``. Writes the scores, and
every row's loss and correctness, to benchmarks/results/overfitting-smollm2.json, and a table with
the verdict to overfitting-smollm2.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.learning.real.files import questions
from trainer.evaluation.prediction_files import path_of, read, train_file
from trainer.reporting.summary import load_summary
from trainer.runtime import atomic_io

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TASK, SPLITS = "condition", ("train", "validation", "shifted_validation")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overfitting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="folder of promptshard example smollm2")
    add("--lengths", nargs="+", type=int, default=[5, 20], help="virtual tokens")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=120)
    add("--tokens-per-step", type=int, default=650)
    add("--words", type=int, default=48, help="cut reviews after this number; 0: whole")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = run_file(given, Path(temporary))
        results = train(run, Path(temporary))
    atomic_io.write(RESULTS / "overfitting-smollm2.json", json.dumps(results) + "\n")
    text = table(results, given.words)
    atomic_io.write(RESULTS / "overfitting-smollm2.md", text)
    print(text)


def table(results: dict[str, Any], words: int) -> str:
    """Return the scores of all prompts and the verdict, as Markdown."""
    summary, training = results["summary"], results["training"]
    rows = summary["tasks"][TASK]["rows"]
    lines = [
        "# Overfitting on a real language model",
        "",
        "`python -m benchmarks.overfitting work`: SmolLM2-135M-Instruct, the question `condition` "
        f"of `promptshard example smollm2`, reviews cut after {words} words, "
        f"{training['steps']} steps of at most {training['tokens_per_step']} tokens, all else "
        f"default. {rows['validation']} validation rows; the {rows['shifted_validation']} shifted "
        "rows are reviews of other drugs than in training.",
        "",
        "| prompt | virtual tokens | validation | loss | other drugs | loss | train rows | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, prompt in summary["prompts"].items():
        cells = [name, str(prompt["num_virtual_tokens"])]
        for split in SPLITS[1:]:
            cells += [f"{prompt[f'{split}_accuracy']:.1%}", f"{prompt[f'{split}_loss']:.3f}"]
        train = results["train"].get(name)
        if train:
            accuracy = sum(train["correct"]) / len(train["correct"])
            cells += [f"{accuracy:.1%}", f"{sum(train['loss']) / sum(train['tokens']):.3f}"]
        lines.append(f"| {' | '.join(cells + [''] * (8 - len(cells)))} |")
    verdict = summary["overfitting"][TASK]["verdict"]
    return "\n".join([*lines, "", "The report's verdict:", "", *(f"> {v}" for v in verdict), ""])


def run_file(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the rows of the run, and return its run file."""
    files = {}
    for split in SPLITS:
        source = given.folder / "data" / f"{TASK}.{split}.jsonl"
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            row["text"] = " ".join(row["text"].split()[: given.words or None])
        files[split] = str(folder / source.name)
        atomic_io.write(Path(files[split]), "".join(json.dumps(row) + "\n" for row in rows))
    sweep = {"num_virtual_tokens": given.lengths, "seed": given.seeds}
    return {
        "output_dir": str(folder / "run"),
        "base": {"model": str(given.folder / "base")},
        "tasks": [questions()[TASK].section(**files)],
        "prompts": [{"name": "prompt", "task": TASK, "sweep": sweep}],
        "training": {"steps": given.steps, "tokens_per_step": given.tokens_per_step},
        "evaluation": {"every": given.steps},
        "tracking": {"system_metrics": False},
    }


def train(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train the run on one process; return its summary and every row's loss and correctness."""
    file, output = folder / "run.yaml", folder / "run"
    file.write_text(yaml.safe_dump(run, sort_keys=False, allow_unicode=True))
    environment = {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    command = [sys.executable, "-m", "launch", "train", str(file), "--processes", "1"]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)
    summary = load_summary(output)
    assert summary is not None
    kept = {"prompts", "tasks", "selected", "overfitting", "time"}
    return {
        "training": run["training"],
        "summary": json.loads(summary.model_dump_json(include=kept, exclude_unset=True)),
        "validation": {name: _rows(output, name) for name in summary.prompts},
        "train": {
            name: rows for name in summary.prompts if (rows := _rows(output, train_file(name)))
        },
    }


def _rows(output: Path, name: str) -> dict[str, list[Any]]:
    """Row number, loss in nats, target tokens and correctness of every row."""
    records = list(read(path_of(output, name)))
    if not records:
        return {}
    return {
        "row": [record["row"] for record in records],
        "loss": [round(record["loss"], 3) for record in records],
        "tokens": [record["tokens"] for record in records],
        "correct": [int(record["correct"]) for record in records],
    }


if __name__ == "__main__":
    main()
