"""Write a finished run's adapters, comparison with baselines, selection, summary and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.data.task_data import TaskData
from trainer.evaluation.score_format import column_title, score_text, shown_scores
from trainer.evaluation.selection import select, standard_error
from trainer.evaluation.statistics import STANDARD_ERROR
from trainer.model.base_license import base_license
from trainer.model.checkpoint_files import BaseFiles, portable_name
from trainer.model.per_layer_inputs import id_rules
from trainer.prompts.peft_adapter import FixedText, save_peft
from trainer.reporting.comparison import compare
from trainer.reporting.html import write_report
from trainer.reporting.model_card import write_cards
from trainer.reporting.overfitting import assess
from trainer.reporting.result_table import ResultRow, TaskTable, task_tables
from trainer.reporting.summary import (
    SCHEMA_VERSION,
    RunSummary,
    Selection,
    ShorterPrompt,
    save_summary,
)
from trainer.runtime.console import Console
from trainer.training.loop import Loop


def write_results(
    output: Path,
    loop: Loop,
    files: BaseFiles,
    measured: Mapping[str, Any],
    console: Console,
    fixed_texts: Mapping[str, FixedText | None],
    base_digest: str,
) -> RunSummary:
    """Write adapters, their model cards, summary and report of a finished run.

    Args:
        measured: fields of ``RunSummary`` that ``measure`` and the checkpoint writer return.
        fixed_texts: text in the segment of each prompt, by its name; None: differs between rows.
        base_digest: SHA-256 of the base's weights.
    """
    usages = _save_adapters(output, loop, files, console, fixed_texts)
    summary = RunSummary.model_validate(
        {
            "schema_version": SCHEMA_VERSION,
            "status": "finished",
            "steps": loop.progress.step,
            "prompts": _prompt_results(loop),
            "tasks": {
                name: {**loop.progress.baselines.get(name, {}), "rows": _num_rows(data)}
                for name, data in loop.tasks.items()
            },
            "data": {name: data.counts for name, data in loop.tasks.items()},
            **measured,
        }
    )
    tables, tasks = task_tables(loop.config, summary), dict(summary.tasks)
    with console.phase("comparing prompts with baselines"):
        tables = [replace(table, comparison=compare(output, table)) for table in tables]
    for table in tables:
        compared = {"comparison": table.comparison}
        tasks[table.task] = tasks[table.task].model_copy(update=compared)
    selected = {table.task: best for table in tables if (best := selection(table))}
    overfitting = {
        table.task: signs
        for table in tables
        if (signs := assess(output, loop.config, table, selected.get(table.task)))
    }
    summary = summary.model_copy(
        update={"tasks": tasks, "selected": selected, "overfitting": overfitting}
    )
    save_summary(output, summary)
    tables = task_tables(loop.config, summary)
    license = base_license(loop.config.base, files.folder)
    write_cards(output, loop.config, summary, tables, usages, base_digest, license)
    try:
        with console.phase("writing the report"):
            write_report(output)
    except Exception as error:  # the results are saved; a failing plot must not fail the run
        console.warn(f"no report written: {type(error).__name__}: {error}")
    times = {"time": loop.times.summary(), "rank_seconds": loop.accounting.rank_seconds}
    summary = summary.model_copy(update=times)  # now with the report
    save_summary(output, summary)
    return summary


def _save_adapters(
    output: Path,
    loop: Loop,
    files: BaseFiles,
    console: Console,
    fixed_texts: Mapping[str, FixedText | None],
) -> dict[str, str]:
    """Save the adapters; return the sections of their cards about the use in PEFT, by prompt."""
    usages = {}
    for k, prompt in enumerate(loop.config.prompts):
        scores = loop.progress.scores.get(prompt.name, {})
        shown = shown_scores(scores, prompt.objective == "distill")
        num_rows = _num_rows(loop.tasks[prompt.task])
        described = ", ".join(
            f"{key.replace('_', ' ')} {score_text(shown, key, num_rows)}"
            for key in shown
            if not key.endswith(STANDARD_ERROR)
        )
        folder = output / "prompts" / prompt.name
        for path, title, virtual_tokens in (
            (folder, prompt.name, loop.bank.best(k)),
            (folder / "last", f"{prompt.name} (last step)", loop.bank.snapshot(k)),
        ):
            if not virtual_tokens.is_finite():
                console.warn(f"prompt {title!r}: its virtual tokens are not finite; not saved")
                continue
            usage = save_peft(
                path,
                virtual_tokens,
                portable_name(loop.config.base),
                loop.config.base.revision,
                title=title,
                description=f"Task {prompt.task}. {described}".strip(),
                num_layers=files.config.num_hidden_layers,
                num_attention_heads=files.config.num_attention_heads,
                fixed_text=fixed_texts.get(prompt.name),
                inside=prompt.name in fixed_texts and fixed_texts[prompt.name] is None,
                rules=id_rules(files.config),
            )
            if path == folder:
                usages[prompt.name] = usage
    return usages


def _prompt_results(loop: Loop) -> dict[str, dict[str, Any]]:
    progress = loop.progress
    results = {}
    for prompt in loop.config.prompts:
        stopped = progress.stopped.get(prompt.name)
        last_step = (stopped or {}).get("step", progress.step)
        results[prompt.name] = {
            "task": prompt.task,
            "method": prompt.method,
            "objective": prompt.objective,
            "num_virtual_tokens": prompt.num_virtual_tokens,
            "best_step": loop.validator.stopping[prompt.name].best_step or last_step,
            "skipped_updates": progress.skipped.get(prompt.name, 0),
            "stopped": stopped,
            **progress.scores.get(prompt.name, {}),
        }
    return results


def _num_rows(data: TaskData) -> dict[str, int]:
    return {split: len(rows.candidates) for split, rows in data.evaluation.items()}


def selection(table: TaskTable) -> Selection | None:
    """Select a task's best prompt, and advise a shorter one; None if no prompt can be ranked."""
    rows = table.num_rows.get("validation")
    selected = select(
        table.prompts, table.metric, lambda row: standard_error(row, table.metric, rows)
    )
    if selected is None:
        return None
    best, shorter = selected
    key, advised = f"validation_{table.metric}", None
    if shorter is not None:
        tokens, score = shorter.num_virtual_tokens, shorter.scores[key]
        advised = ShorterPrompt(prompt=shorter.name, score=score, num_virtual_tokens=tokens)
    return Selection(
        prompt=best.name,
        metric=table.metric,
        score=best.scores[key],
        num_virtual_tokens=best.num_virtual_tokens,
        why=_why(table, best),
        shorter=advised,
    )


def _why(table: TaskTable, best: ResultRow) -> str:
    column = table.column(best)
    score = f"validation {column_title(column)} {table.cell(best, column)}"
    if len(table.prompts) == 1:
        return f"the only prompt: {score}"
    text = f"best of {len(table.prompts)} prompts: {score}"
    if best.eliminated:
        text += "; halving eliminated it, but no other prompt is left"
    second = next((row for row in table.prompts if row.name != best.name and row.ranked), None)
    if second is None or second.shown.get(column) != best.shown.get(column):
        return text
    return f"{text}; {second.name} has the same {column_title(column)}"
