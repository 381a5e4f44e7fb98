"""Options of ``promptshard lint``. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.evaluation.metric_sums import METRICS

#: Folder of the results of ``--measure`` in the output folder of the run file.
FOLDER = "lint"
RESULTS = "lint.json"


@dataclass(frozen=True)
class Options:
    """Which instructions to check, and how to measure their rewrites.

    Attributes:
        text: an instruction in place of those of the run file.
        task: only the instructions of this task; of ``text``, the task that it is for.
        rows: maximum number of validation rows of a task, those with the smallest content hash.
        metric: None: the task's own.
    """

    run_file: str
    overrides: tuple[str, ...] = ()
    text: str | None = None
    task: str | None = None
    rows: int | None = None
    metric: str | None = None

    def arguments(self) -> list[str]:
        """Return the command line that ``parse`` reads."""
        words = [self.run_file, *self.overrides]
        for name in ("text", "task", "rows", "metric"):
            if (value := getattr(self, name)) is not None:
                words.append(f"--{name}={value}")
        return words


def parse(arguments: Sequence[str] | None) -> Options:
    """Parse the arguments of a rank."""
    parser = argparse.ArgumentParser(prog="deepspeed --module trainer.commands.lint")
    parser.add_argument("run_file", metavar="RUN.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--text", metavar="TEXT", help="in place of those of the run file")
    parser.add_argument("--task", metavar="NAME")
    parser.add_argument("--rows", type=int, metavar="N", help="maximum rows of a task")
    parser.add_argument("--metric", choices=METRICS)
    parser.add_argument("--local_rank", type=int, help="given by the launcher; not used")
    given = parser.parse_args(arguments)
    return Options(
        given.run_file, tuple(given.overrides), given.text, given.task, given.rows, given.metric
    )


def results_folder(output_dir: str) -> Path:
    """Folder of the logs, the predictions and the results."""
    return Path(output_dir) / FOLDER
