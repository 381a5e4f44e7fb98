"""Score instructions and their rewrites on all ranks."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.commands.evaluate.arm import Arm
from trainer.commands.evaluate.rows import RowEncoder
from trainer.commands.evaluate.scoring_pass import BaseOnDemand, Loaded, score_missing
from trainer.commands.evaluate.store import PredictionStore
from trainer.commands.lint.effects import Records, measured
from trainer.commands.lint.options import RESULTS, Options, results_folder
from trainer.commands.lint.selection import Checked, checked_instructions, to_measure
from trainer.commands.lint.texts import arm_name, arm_of, distinct, selected
from trainer.config import RunConfig
from trainer.data.task_data import TaskData
from trainer.data.tokenization.chat_template import read_chat_date, reads_date
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.model_loading import open_base_on_all
from trainer.evaluation.baselines import VALIDATION
from trainer.evaluation.lint.results import CheckedText, LintResults, unmeasured
from trainer.evaluation.lint.rewrites import Rewrites, rewrites
from trainer.model.checkpoint_files import BaseFiles
from trainer.runtime import atomic_io
from trainer.runtime.console import Console
from trainer.training.task_loading import load_tasks_per_node


def measure(options: Options, config: RunConfig, console: Console) -> None:
    """Score the instructions with a rewrite, and all rewritten texts; a collective.

    Rank 0 writes ``lint.json``.

    Raises:
        BadInput: on all ranks, before the base is loaded.
        Stopped: after a stop signal; the records of complete blocks are kept.
    """
    checked = checked_instructions(config, options)
    texts = {i: rewrites(each.instruction.text, each.findings) for i, each in enumerate(checked)}
    measured_run = _measured_tasks(config, to_measure(checked))
    output = results_folder(config.output_dir)
    engine = Engine(config.engine.timeout_seconds)
    engine.start_watchdog(output / "logs", config.engine.silence_seconds)
    store = PredictionStore(output) if engine.is_main else None
    with engine.held_on_main(None if store is None else store.locked()):
        files = open_base_on_all(engine, config.base, console)
        date = engine.run_on_main(lambda: _chat_date(config, files))
        with console.phase("reading rows"):
            tasks = load_tasks_per_node(engine, files, measured_run, console, date, (VALIDATION,))
            arms = engine.run_on_all(
                lambda: _arms(options, checked, texts, tasks, _encoder(files, date, console))
            )
        score_missing(BaseOnDemand(engine, files, config, console), arms, Loaded(), store)
        if store is not None:
            results = [
                _result(options, each, texts[i], tasks, store) for i, each in enumerate(checked)
            ]
            content = LintResults(prompts=results).model_dump(mode="json")
            atomic_io.write_json(output / RESULTS, content)
    engine.close()


def _measured_tasks(config: RunConfig, checked: Sequence[Checked]) -> RunConfig:
    """Keep the tasks of the instructions, without prompts and without their other texts."""
    names = {each.instruction.task for each in checked}
    tasks = [
        task.model_copy(update={"hand_written": []}) for task in config.tasks if task.name in names
    ]
    return config.model_copy(update={"tasks": tasks, "prompts": []})


def _chat_date(config: RunConfig, files: BaseFiles) -> datetime.date | None:
    """The date that the run's chat template reads, or would read if the run started today."""
    kept = read_chat_date(Path(config.output_dir))
    return kept or (datetime.date.today() if reads_date(files.tokenizer) else None)


def _encoder(files: BaseFiles, date: datetime.date | None, console: Console) -> RowEncoder:
    return RowEncoder(
        files.tokenizer,
        files.context_length,
        files.config.vocab_size,
        date,
        files.end_ids,
        console.working,
    )


def _arms(
    options: Options,
    checked: Sequence[Checked],
    texts: Mapping[int, Rewrites],
    tasks: Mapping[str, TaskData],
    encoder: RowEncoder,
) -> dict[str, list[Arm]]:
    arms: dict[str, list[Arm]] = {name: [] for name in tasks}
    rows = {
        name: selected(data.evaluation[VALIDATION], options.rows) for name, data in tasks.items()
    }
    for i, each in enumerate(checked):
        name = str(each.instruction.task)
        if texts[i].together is None:
            continue
        metric = options.metric or tasks[name].task.metric
        arms[name] += [
            arm_of(each.instruction, text, rows[name], encoder, metric) for text in texts[i].texts
        ]
    return {name: distinct(own) for name, own in arms.items()}


def _result(
    options: Options,
    checked: Checked,
    texts: Rewrites,
    tasks: Mapping[str, TaskData],
    store: PredictionStore,
) -> CheckedText:
    if texts.together is None:
        return unmeasured(checked.instruction, checked.findings)
    task = tasks[str(checked.instruction.task)].task

    def records(text: str) -> Records:
        return store.records(task.name, arm_name(checked.instruction, text))

    return measured(checked, texts, records, task, options.metric or task.metric)
