"""The first steps of the quickstart, as a user starts them on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def first_steps(output_dir: Path, processes: int = 1, **changed: str) -> dict[str, Any]:
    """Train for three steps and return the results of each prompt.

    Args:
        changed: settings of the run file, with ``__`` in place of the dot.
    """
    settings = {
        "output_dir": output_dir,
        "training.steps": 3,
        "evaluation.every": 3,
        "checkpoint.every": 3,
        "tracking.system_metrics": "false",
        "tracking.uri": f"sqlite:///{output_dir}/mlflow.db",
    } | {name.replace("__", "."): value for name, value in changed.items()}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    command = ["-m", "launch", "train", "examples/quickstart.yaml", *overrides]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *command, "--processes", str(processes)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    prompts: dict[str, Any] = json.loads((output_dir / "summary.json").read_text())["prompts"]
    assert all(0 < prompt["validation_loss"] < 20 for prompt in prompts.values())
    return prompts
