"""Installed size of every package, and import times of a rank, before and after a change.

    python -m benchmarks.install --before OLD/.venv/bin/python --after NEW/.venv/bin/python

The two interpreters belong to virtual environments in which the two versions were installed with
``pip install -c constraints.txt -e .``. Writes benchmarks/results/install.md and install.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.figures import machine

RESULTS = Path(__file__).resolve().parent / "results"
#: Largest ratio of CPU times: a rank to the three libraries.
REACH = 1.3
#: Imports that are timed, each in a new process.
IMPORTS = {
    "libraries": "import torch, transformers, deepspeed",
    "libraries with a model class": "import torch, transformers, deepspeed; "
    "transformers.PreTrainedModel",
    "rank": "import trainer.__main__, trainer.run",
}
#: Prints the version, and the size of the files of every package as pip recorded them.
SIZES = """\
import importlib.metadata, json, os, platform
packages = []
for package in importlib.metadata.distributions():
    size = 0
    for file in package.files or ():
        try:
            size += os.lstat(package.locate_file(file)).st_size
        except OSError:
            pass
    packages.append([package.name, package.version, size])
print(json.dumps([platform.python_version(), packages]))
"""


def sizes(python: str) -> dict[str, Any]:
    """Return ``{python, bytes, packages: {name: {version, bytes}}}`` of an environment."""
    # -P: the working directory must not add packages
    text = subprocess.check_output([python, "-P", "-c", SIZES], text=True)
    version, packages = json.loads(text)
    packages.sort(key=lambda package: -package[2])
    return {
        "python": version,
        "bytes": sum(size for _, _, size in packages),
        "packages": {
            name: {"version": number, "bytes": size} for name, number, size in packages if size
        },
    }


def cpu_seconds(python: str, code: str) -> float:
    """Return the CPU time of a new process that runs ``code``."""
    process = subprocess.Popen(
        [python, "-P", "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{python} -c {code!r} failed")
    return usage.ru_utime + usage.ru_stime


def import_times(pythons: dict[str, str], rounds: int) -> dict[str, dict[str, float]]:
    """Return median CPU times by environment and import; all take turns, after a first round."""
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        for label, python in pythons.items():
            for name, code in IMPORTS.items():
                seconds = cpu_seconds(python, code)
                if turn:
                    times.setdefault((label, name), []).append(seconds)
    return {
        label: {name: statistics.median(times[label, name]) for name in IMPORTS}
        for label in pythons
    }


def markdown(result: dict[str, Any]) -> str:
    """Render the result: totals, import times, and the packages whose size differs."""
    before, after = result["sizes"]["before"], result["sizes"]["after"]
    lines = [
        "# Installation\n",
        f"`python -m benchmarks.install` on {result['machine']}, Python {after['python']}.\n",
        "## Size\n",
        "Sizes of the files that pip recorded, with their bytecode, in MB (10^6 bytes). torch is",
        "its CPU build.\n",
        "| | before | after |",
        "|---|---|---|",
        f"| packages | {len(before['packages'])} | {len(after['packages'])} |",
        f"| MB | {before['bytes'] / 1e6:,.0f} | {after['bytes'] / 1e6:,.0f} |\n",
        f"The difference is {(before['bytes'] - after['bytes']) / 1e6:,.0f} MB.\n",
        "| package | MB before | MB after |",
        "|---|---|---|",
    ]
    small = [0.0, 0.0]
    for name in {**before["packages"], **after["packages"]}:
        pair = [each["packages"].get(name, {}).get("bytes", 0) / 1e6 for each in (before, after)]
        if max(pair) >= 1:
            lines.append(f"| {name} | " + " | ".join(f"{x:.1f}" if x else "" for x in pair) + " |")
        else:
            small = [total + size for total, size in zip(small, pair, strict=True)]
    lines += [
        f"| smaller than 1 MB | {small[0]:.1f} | {small[1]:.1f} |\n",
        "## Imports of a rank\n",
        f"CPU seconds of a new process: median of {result['rounds']} runs in turns, files cached.",
        "`import transformers` imports no model class. Every program that builds a model imports",
        "one, as a rank does when it opens the base.\n",
        "| | before | after |",
        "|---|---|---|",
    ]
    times = result["cpu_seconds"]
    for name, code in IMPORTS.items():
        lines.append(f"| `{code}` | {times['before'][name]:.2f} | {times['after'][name]:.2f} |")
    for name in list(IMPORTS)[:2]:
        ratios = [times[label]["rank"] / times[label][name] for label in ("before", "after")]
        lines.append(f"| rank / {name} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    return "\n".join([*lines, f"\nThe target is a ratio of at most {REACH}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--before", required=True, help="python of the older environment")
    parser.add_argument("--after", required=True, help="python of the newer environment")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    pythons = {"before": args.before, "after": args.after}
    result = {
        "machine": machine(),
        "rounds": args.rounds,
        "sizes": {label: sizes(python) for label, python in pythons.items()},
        "cpu_seconds": import_times(pythons, args.rounds),
    }
    (RESULTS / "install.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "install.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
