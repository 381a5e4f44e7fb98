"""The rows of all tasks of a run, read once per node and checked."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence

from trainer.config import RunConfig
from trainer.data.splits import SPLITS
from trainer.data.task_data import TaskData, load_tasks
from trainer.distributed.deepspeed_engine import Engine
from trainer.evaluation.metrics import check_sandbox
from trainer.evaluation.stop_criteria import check_all_targets
from trainer.model.checkpoint_files import BaseFiles
from trainer.model.tokenizer_class import class_warning
from trainer.runtime.console import Console
from trainer.runtime.process import ROWS_CHECKED


def load_tasks_per_node(
    engine: Engine,
    files: BaseFiles,
    config: RunConfig,
    console: Console,
    date: datetime.date | None,
    splits: Sequence[str] = SPLITS,
) -> dict[str, TaskData]:
    """Read and tokenize the rows of all tasks, once per node; a collective."""
    return engine.load_once_per_node(
        lambda: load_tasks(
            config,
            files.tokenizer,
            files.context_length,
            files.config.vocab_size,
            console.working,
            console.reading,
            splits=splits,
            date=date,
            end_ids=files.end_ids,
        )
    )


def read_tasks(
    engine: Engine,
    files: BaseFiles,
    config: RunConfig,
    console: Console,
    date: datetime.date | None,
) -> dict[str, TaskData]:
    """Read and tokenize the rows of all tasks, and print remarks and warnings; a collective.

    Args:
        date: date for chat templates; None if none reads a date.

    Raises:
        BadInput: with the problems of all tasks.
    """
    tasks = load_tasks_per_node(engine, files, config, console, date)
    if warning := engine.run_on_main(lambda: class_warning(files.tokenizer, files.folder)):
        console.warn(warning)
    engine.run_on_all(lambda: check_all_targets(tasks, files.tokenizer, files.generation))
    if date:
        console.print(f"the chat template reads the date: {date}, also when the run is resumed")
    runs_code = any(task.metric == "execution" for task in config.tasks)
    if runs_code and (warning := engine.run_on_main(check_sandbox)):
        console.warn(warning)
    if ROWS_CHECKED not in os.environ:
        for note in config.notes:
            console.print(note)
    for data in tasks.values():
        if ROWS_CHECKED not in os.environ:
            for remark in data.remarks:
                console.print(remark)
            for leak in data.leaks:
                console.warn(leak.warning)
        for note in data.notes:
            console.print(note)
        for warning in data.warnings:
            console.warn(warning)
    return tasks
