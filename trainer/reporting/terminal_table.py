"""Print the results of a finished run on the terminal."""

from __future__ import annotations

from shlex import quote

from trainer.config import RunConfig
from trainer.reporting.result_table import task_tables
from trainer.reporting.summary import RunSummary
from trainer.runtime.console import Console
from trainer.runtime.phases import breakdown


def show_results(summary: RunSummary, config: RunConfig, console: Console) -> None:
    """Print verdict and table of every task, files written, and a command to try a prompt."""
    output = config.output_dir
    tables = task_tables(config, summary)
    for table in tables:
        console.print(f"{table.task}: {table.verdict}" if len(tables) > 1 else table.verdict)
    for table in tables:
        console.table(
            f"{table.task} ({table.counts})" if table.counts else table.task,
            ["prompt", *table.titles],
            [
                [", ".join(filter(None, [row.short_label, row.detail, row.tag])), *table.cells(row)]
                for row in table.rows
            ],
        )
        if table.advice:
            console.print(table.advice)
    diverged = [row.name for table in tables for row in table.prompts if row.diverged]
    if diverged:
        console.warn(f"diverged and stopped early: {', '.join(diverged)}; lower learning_rate")
    speed = summary.throughput.useful_tokens_per_second
    console.print(
        f"{summary.steps} steps, {f'{speed:,.0f} useful tokens/s; ' if speed else ''}adapters in "
        f"{output}/prompts, predictions in {output}/predictions"
    )
    if summary.time:
        console.print(f"time:    {breakdown(summary.time)}")
    console.print(f"report:  {output}/report.html")
    name = next((best.prompt for best in summary.selected.values()), next(iter(summary.prompts)))
    console.print(
        f'try it:  promptshard generate {quote(output)} --prompt {quote(name)} --input "..."'
    )
