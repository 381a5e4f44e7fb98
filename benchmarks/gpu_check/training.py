"""Training runs on an int8 base of 8B shape: speed, memory, share of the roofline.

Every run trains on the same rows (log-normal lengths, median 60 tokens, maximum 512) with 20
virtual tokens per prompt. A run is one rank of ``promptshard train``, in the process of its part.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu_check.int8_base import make_int8_base
from benchmarks.gpu_check.part import Check
from benchmarks.gpu_check.sizes import VIRTUAL_TOKENS
from benchmarks.peers.rows import ANSWER, make_rows
from benchmarks.random_base import VOCAB_SIZE
from launch.launcher_command import free_port
from trainer import __main__ as trainer

ROWS = 2000
#: Settings of the parts that differ from int8 and sdpa.
MATMUL = {"train_dequantize": "dequantize"}
ATTENTION = {"train_flex": "flex"}


def write_base(check: Check) -> None:
    """Write the base and the rows that the training runs share."""
    started = time.perf_counter()
    make_int8_base(check.folder / "base", check.sizes.shape)
    write_rows(check.folder / "rows.jsonl")
    seconds = time.perf_counter() - started
    written = sum(file.stat().st_size for file in (check.folder / "base").iterdir())
    check.save({"seconds": seconds, "bytes": written})


def write_rows(path: Path) -> None:
    """Write rows of random words, of which the last ones are labels."""
    with path.open("w") as file:
        for row in make_rows(ROWS, VOCAB_SIZE):
            words = [f"w{token}" for token in row.input_ids]
            cut = max(1, len(words) - ANSWER)
            line = {"text": " ".join(words[:cut]), "label": " ".join(words[cut:])}
            file.write(json.dumps(line) + "\n")


def train(check: Check) -> None:
    """Train, and save memory, last loss, and speed of the steps after the warm-up.

    Raises:
        RuntimeError: if the run fails; the end of its output is in the report.
    """
    path = check.folder / f"{check.name}.yaml"
    run = run_file(check)
    path.write_text(yaml.safe_dump(run))
    os.environ["MASTER_PORT"] = str(free_port())
    if code := trainer.main([str(path)]):
        raise RuntimeError(f"the run ended with exit code {code}")
    output = check.folder / check.name
    summary = json.loads((output / "summary.json").read_text())
    seconds, speed = _timed(output / "metrics.jsonl", check.sizes.warm_up)
    check.save(
        {
            "prompts": len(summary["prompts"]),
            "tokens_per_step": run["training"]["tokens_per_step"] * len(run["prompts"]),
            "useful_tokens_per_second": speed,
            "step_seconds": seconds,
            "train_loss": _last(output / "metrics.jsonl", "train_loss"),
            "base_bytes_per_rank": summary["memory"]["base_bytes_per_rank"],
            "peak_gpu_bytes": summary["memory"]["peak_gpu_bytes"],
            "stream_tokens": summary["memory"]["stream_tokens"],
            "load_seconds": summary["load"]["seconds"],
        }
    )


def run_file(check: Check) -> dict[str, Any]:
    """Return the run file of a part.

    The bank's prompts share ``step_tokens``, and ``train_one`` trains one of them alone. So the
    bank has the tokens per step of ``train_int8``, and the tokens per prompt of ``train_one``.
    """
    sizes = check.sizes
    prompts = sizes.bank if check.name == "train_bank" else 1
    shares = sizes.bank if check.name in ("train_bank", "train_one") else 1
    rows = str(check.folder / "rows.jsonl")
    # On a CPU, int8 products are compiled for half a minute, and FlexAttention has no backward.
    matmul = "dequantize" if check.small else MATMUL.get(check.name, "int8")
    attention = "sdpa" if check.small else ATTENTION.get(check.name, "sdpa")
    return {
        "output_dir": str(check.folder / check.name),
        "base": {"model": str(check.folder / "base"), "matmul": matmul},
        "engine": {"attention": attention},
        "tasks": [
            {
                "name": "rows",
                "train": rows,
                "validation": rows,
                "max_validation_rows": 16,
                "input": "{text}",
                "target": " {label}",
            }
        ],
        "prompts": [
            {
                "name": f"prompt-{i}",
                "task": "rows",
                "num_virtual_tokens": VIRTUAL_TOKENS,
                "init": "vocab",
                "seed": i,
            }
            for i in range(prompts)
        ],
        "training": {"steps": sizes.steps, "tokens_per_step": sizes.step_tokens // shares},
        "evaluation": {"every": sizes.steps},
        "checkpoint": {"every": sizes.steps},
        "tracking": {"system_metrics": False, "uri": f"sqlite:///{check.folder}/mlflow.db"},
    }


def _timed(path: Path, warm_up: int) -> tuple[float, float]:
    """Return the median step's seconds and the useful tokens per second after the warm-up."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [
        row["metrics"] for row in rows if "step_seconds" in row["metrics"] and row["step"] > warm_up
    ]
    seconds = [step["step_seconds"] for step in steps]
    tokens = [step["useful_tokens_per_second"] * step["step_seconds"] for step in steps]
    return statistics.median(seconds), sum(tokens) / sum(seconds)


def _last(path: Path, metric: str) -> float:
    rows = (json.loads(line)["metrics"] for line in path.read_text().splitlines())
    return float([row[metric] for row in rows if metric in row][-1])
