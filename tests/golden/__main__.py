"""Write the golden losses of this device: ``python -m tests.golden``."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.golden import ROOT, RUNS, TRIAGE_PROMPT, golden_file, record


def main() -> None:
    results = {}
    for name, arguments in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "run"
            tracking = f"tracking.uri=sqlite:///{folder}/mlflow.db"
            command = [sys.executable, "-m", "launch", "train", *arguments]
            subprocess.run([*command, f"output_dir={output}", tracking], cwd=ROOT, check=True)
            results[name] = record(output)
            if name == "quickstart":
                trained = output / "prompts" / "triage" / "adapter_model.safetensors"
                shutil.copyfile(trained, TRIAGE_PROMPT)
    text = json.dumps(results, indent=1)
    # A list of numbers on one line: the diff of a change is one line per prompt.
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    golden_file().write_text(text + "\n")


if __name__ == "__main__":
    main()
