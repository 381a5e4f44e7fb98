"""Scores with few training rows: this trainer's defaults compared with PEFT at its best rate.

python -m benchmarks.learning --base tiny       # the examples' tasks, minutes; see its --help
python -m benchmarks.learning --base smollm2    # a real model, hours; resumes; see its --help
"""

from __future__ import annotations

import sys

from benchmarks.learning import tiny_base
from benchmarks.learning.real import command

BASES = {"tiny": tiny_base.main, "smollm2": command.main}


def main(arguments: list[str]) -> None:
    """Run the benchmark of the base that ``--base`` names, by default of the tiny base."""
    base = "tiny"
    if arguments[:1] == ["--base"] and len(arguments) > 1:
        base, arguments = arguments[1], arguments[2:]
    if base not in BASES:
        sys.exit(f"--base: {base!r} is not one of {', '.join(BASES)}")
    BASES[base](arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
