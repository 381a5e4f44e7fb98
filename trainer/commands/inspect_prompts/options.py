"""Options of ``promptshard inspect RUN_DIR``. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.commands.evaluate import options as evaluation
from trainer.commands.evaluate.selection import SelectedRun, selected_run

#: Validation rows of a task: each is read once per virtual token.
ROWS = 256


@dataclass(frozen=True)
class Options:
    """What to inspect, and on which rows.

    Attributes:
        prompts: names; empty: all.
        data: file of rows in place of the task's validation rows.
        rows: maximum number of rows of a task, those with the smallest content hash.
        demonstrations: descriptions of other tasks for the elicitation; empty: general ones.
        prune: also write shorter adapters.
        json: output file; None: ``inspection.json`` of the run.
    """

    run_dir: Path
    prompts: tuple[str, ...] = ()
    data: str | None = None
    rows: int = ROWS
    demonstrations: tuple[str, ...] = ()
    prune: bool = False
    json: str | None = None

    def selected_run(self) -> SelectedRun:
        """Select the prompts and their tasks; raises ``BadInput`` with all problems."""
        return selected_run(
            evaluation.Options(self.run_dir, prompts=self.prompts, data=self.data, rows=self.rows)
        )

    def arguments(self) -> list[str]:
        """Return the command line that ``parse`` reads."""
        words = [str(self.run_dir), f"--rows={self.rows}"]
        words += [f"--prompt={name}" for name in self.prompts]
        words += [f"--demonstration={text}" for text in self.demonstrations]
        words += [f"--data={self.data}"] if self.data is not None else []
        words += ["--prune"] if self.prune else []
        return words + ([f"--json={self.json}"] if self.json is not None else [])


def parse(arguments: Sequence[str] | None) -> Options:
    """Parse the arguments of a rank."""
    parser = argparse.ArgumentParser(prog="deepspeed --module trainer.commands.inspect_prompts")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    repeated: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--prompt", dest="prompts", metavar="NAME", **repeated)
    parser.add_argument("--demonstration", dest="demonstrations", metavar="TEXT", **repeated)
    parser.add_argument("--data", metavar="FILE", help="rows in place of the validation rows")
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help="rows of a task")
    parser.add_argument("--prune", action="store_true", help="write shorter adapters")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--local_rank", type=int, help="given by the launcher; not used")
    values: dict[str, Any] = vars(parser.parse_args(arguments))
    del values["local_rank"]
    lists: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Options(**lists)
