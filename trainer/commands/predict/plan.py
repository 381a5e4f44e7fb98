"""What ``promptshard predict`` predicts, with all checks that need no base. Imports no torch."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import Task
from trainer.data.ingest import OnRows
from trainer.inference.input_rows import InputRows, read_rows
from trainer.inference.saved_run import SavedRun, TrainedPrompt, open_run
from trainer.prompts.saved_prompts import WEIGHTS
from trainer.runtime.errors import BadInput

#: Fields of every line; other fields are prompts.
ROW, ID = "row", "id"


@dataclass(frozen=True)
class Options:
    """Options of the command.

    Attributes:
        prompts: names; empty: all finished prompts.
        data: file of rows.
        out: JSON Lines file.
        ignore_targets: do not read targets.
        fresh: replace the output file.
    """

    run_dir: Path
    prompts: tuple[str, ...]
    data: str
    out: Path
    ignore_targets: bool = False
    fresh: bool = False

    def arguments(self) -> list[str]:
        """Return the command line that ``parse`` reads."""
        words = [str(self.run_dir), f"--data={self.data}", f"--out={self.out}"]
        words += [f"--prompt={name}" for name in self.prompts]
        words += ["--ignore-targets"] if self.ignore_targets else []
        return [*words, *(["--fresh"] if self.fresh else [])]


def parse(arguments: Sequence[str] | None) -> Options:
    """Parse the arguments of a rank."""
    parser = argparse.ArgumentParser(prog="deepspeed --module trainer.commands.predict")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("--data", metavar="FILE", required=True)
    parser.add_argument("--out", metavar="FILE.jsonl", type=Path, required=True)
    parser.add_argument("--prompt", dest="prompts", metavar="NAME", action="append", default=[])
    parser.add_argument("--ignore-targets", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--local_rank", type=int, help="given by the launcher; not used")
    values: dict[str, Any] = vars(parser.parse_args(arguments))
    del values["local_rank"]
    return Options(**values | {"prompts": tuple(values["prompts"])})


@dataclass(frozen=True)
class PredictionPlan:
    """Prompts and the rows that each predicts.

    Attributes:
        rows: of every task of the prompts, the same rows of the file.
    """

    run: SavedRun
    prompts: tuple[TrainedPrompt, ...]
    rows: Mapping[str, InputRows]

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.rows.values())).rows)

    def identity(self, options: Options) -> dict[str, Any]:
        """Return everything that the output depends on, as JSON; file paths do not matter."""
        first = next(iter(self.rows.values()))
        names = {prompt.task.name for prompt in self.prompts}
        return {
            "prompts": {prompt.name: _digest(prompt.folder / WEIGHTS) for prompt in self.prompts},
            "tasks": [
                task.model_dump(mode="json", exclude=_NO_EFFECT)
                for task in self.run.config.tasks
                if task.name in names
            ],
            "base": self.run.config.base.model_dump(mode="json", exclude={"model"}),
            "data": first.rows.digest,
            "ignore_targets": options.ignore_targets,
        }


#: Settings of a task without effect on predictions.
_NO_EFFECT = {
    "train",
    "validation",
    "shifted_validation",
    "validation_share",
    "max_rows",
    "max_validation_rows",
    "hand_written",
    "paraphrases",
}


def make_plan(options: Options, on_rows: OnRows | None = None) -> PredictionPlan:
    """Open the run, select prompts, and read all rows.

    Raises:
        BadInput: with the problems of all prompts, or of all rows.
    """
    both_exist = options.out.exists() and Path(options.data).exists()
    if both_exist and options.out.samefile(options.data):
        raise BadInput("--out: is the file of --data; name another file")
    run = open_run(options.run_dir)
    prompts = run.selected(options.prompts)
    tasks = {prompt.task.name: prompt.task for prompt in prompts}
    if not options.prompts and len(tasks) > 1:
        raise BadInput(
            f"--data: has the rows of one task, but the run has {', '.join(tasks)}; name the "
            "prompts with --prompt"
        )
    clash = [prompt.name for prompt in prompts if prompt.name in (ROW, ID)]
    if clash:
        raise BadInput(
            f"--prompt: {clash[0]!r} is also a field of every line; rename the prompt's folder and "
            "its name in run.yaml"
        )

    def read(task: Task, *, use_targets: bool) -> InputRows:
        return read_rows(
            options.data, task, setting="--data", use_targets=use_targets, on_rows=on_rows
        )

    rows, problems, targets_only = {}, dict[str, None](), True
    for name, task in tasks.items():
        try:
            rows[name] = read(task, use_targets=not options.ignore_targets)
        except BadInput as error:
            problems |= dict.fromkeys(error.problems)
            try:
                read(task, use_targets=False)
            except BadInput:
                targets_only = False
    if problems:
        remedy = ["only the targets are wrong: add --ignore-targets to predict without them"]
        raise BadInput([*problems, *(remedy if targets_only else [])])
    return PredictionPlan(run, tuple(prompts), rows)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
