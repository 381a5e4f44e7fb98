"""Print the results of a finished run on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from shlex import quote

from rich.cells import cell_len, set_cell_size

from trainer.config import RunConfig
from trainer.config.ranking import rank
from trainer.evaluation.score_format import DIVERGENCE, column_title, format_score
from trainer.reporting.result_table import PROMPT, ResultRow, TaskTable, task_tables
from trainer.reporting.summary import RunSummary
from trainer.runtime.console import Console
from trainer.runtime.phases import breakdown

#: Number of prompts in a table that has more than ``ALL_SHOWN``.
TOP, ALL_SHOWN = 10, 15
#: Mark of the best prompt and the best baseline.
BEST = "*"
#: Characters between two columns.
GAP = 3
#: A narrow terminal shows fewer scores before it cuts names of prompts and baselines to less.
PROMPT_WIDTH, BASELINE_WIDTH = 48, 30
SHORTEST_NAME = 12
LOSSES = ("validation_loss", f"validation{DIVERGENCE}")
STOPPED = {"early_stopping": "early", "halving": "halving", "diverged": "diverged"}


@dataclass(frozen=True)
class Layout:
    """Columns of a result table.

    Attributes:
        columns: scores.
        intervals: number of the columns with a 95% interval.
        stops: whether a column tells when and why prompts were stopped.
        name_width: width of the first column, in characters.
    """

    columns: Sequence[str]
    intervals: int
    stops: bool = True
    name_width: int = SHORTEST_NAME


def show_results(summary: RunSummary, config: RunConfig, console: Console) -> None:
    """Print table and verdict of every task, seconds by phase, and what to do next."""
    output = config.output_dir
    tables = task_tables(config, summary)
    for table in tables:
        console.print()
        show_table(table, output, console)
        console.paragraph(table.verdict)
        if table.advice:
            console.paragraph(table.advice)
        if table.overfitting and table.overfitting.verdict:
            console.paragraph(" ".join(table.overfitting.verdict))
    console.print()
    diverged = [row.name for table in tables for row in table.prompts if row.diverged]
    if diverged:
        console.warn(f"diverged and stopped early: {', '.join(diverged)}; lower learning_rate")
    speed = summary.throughput.useful_tokens_per_second
    console.print(f"{summary.steps} steps{f', {speed:,.0f} useful tokens/s' if speed else ''}")
    if summary.time:
        console.paragraph(f"seconds by phase: {breakdown(summary.time)}")
    name = next((best.prompt for best in summary.selected.values()), next(iter(summary.prompts)))
    console.print(f"report:  {output}/report.html (adapters in prompts/, answers in predictions/)")
    console.print(
        f'try it:  promptshard generate {quote(output)} --prompt {quote(name)} --input "..."'
    )


def show_table(table: TaskTable, output_dir: str, console: Console) -> None:
    """Print a task's prompts, then its baselines, each from best to worst, one line each."""
    prompts = table.prompts
    if len(prompts) > ALL_SHOWN and not console.verbose:
        prompts = prompts[:TOP]
    ranked = rank(table.baselines, table.metric)
    rows = [*prompts, *ranked, *(row for row in table.baselines if row not in ranked)]
    if not rows:
        return
    layout = fit(table, rows, console.width)
    if not console.is_terminal:  # a file is not wrapped, and names can be searched for
        longest = max((cell_len(_name(row)) for row in prompts), default=0)
        layout = replace(layout, name_width=max(layout.name_width, longest))
    titles, cells = _table(table, rows, layout)
    names = [_short_name(row, layout.name_width) for row in rows]
    console.table(
        f"{table.task} ({table.counts})" if table.counts else table.task,
        ["  prompt", *titles],
        [[name, *row] for name, row in zip(names, cells, strict=True)],
        groups=[len(prompts) - 1] if len(rows) > len(prompts) else [],
        bold=[i for i, row in enumerate(rows) if row.best],
        wrap=False,
    )
    if hidden := len(table.prompts) - len(prompts):
        console.print(
            f"  {hidden} more prompts rank lower: see {output_dir}/report.html, or repeat with "
            "--verbose"
        )
    if any(row.best for row in rows):
        console.print(f"{BEST} best prompt, best baseline")


def fit(table: TaskTable, rows: Sequence[ResultRow], width: int) -> Layout:
    """Choose the columns that fit into a width: names have priority, then scores, intervals."""
    columns = table.columns
    ranking = [column for i, column in enumerate(columns) if i == 0 or column in LOSSES]
    with_ood = [c for c in columns if c in ranking or c.removeprefix("shifted_") == columns[0]]
    layouts = [
        *(Layout(columns, intervals) for intervals in (len(columns), 2, 1, 0)),
        *(Layout(fewer, intervals) for fewer in (with_ood, ranking) for intervals in (1, 0)),
        Layout(columns[:1], 0),
        Layout(columns[:1], 0, stops=False),
    ]
    names = [(row.kind == PROMPT, cell_len(_name(row))) for row in rows]
    wanted = max(min(n, PROMPT_WIDTH if prompt else BASELINE_WIDTH) for prompt, n in names)
    left = SHORTEST_NAME
    for layout in layouts:
        titles, cells = _table(table, rows, layout)
        widths = [max(map(cell_len, column)) for column in zip(titles, *cells, strict=True)]
        left = width - sum(widths) - GAP * len(widths)
        if left >= wanted:
            break
    longest = max(n for _, n in names)
    return replace(layout, name_width=min(longest, max(left, SHORTEST_NAME)))


def _table(
    table: TaskTable, rows: Sequence[ResultRow], layout: Layout
) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells of all columns except the names."""
    stops = layout.stops and any(_stop(row) for row in rows)
    scores = [column_title(column) for column in layout.columns]
    titles = ["tokens", *scores, *(["stopped"] if stops else [])]
    cells = []
    for row in rows:
        scores = [
            table.cell(row, column)
            if i < layout.intervals
            else format_score(column, row.shown.get(column))
            for i, column in enumerate(layout.columns)
        ]
        tokens = str(row.num_virtual_tokens) if row.kind == PROMPT else ""
        cells.append([tokens, *scores, *([_stop(row)] if stops else [])])
    return titles, cells


def _name(row: ResultRow) -> str:
    label = row.label if row.kind == PROMPT else f"baseline: {row.short_label}"
    return f"{BEST if row.best else ' '} {label}"


def _stop(row: ResultRow) -> str:
    """``step 20, halving``, or empty if all steps were trained."""
    return f"step {row.stop.step}, {STOPPED[row.stop.reason]}" if row.stop else ""


def _short_name(row: ResultRow, width: int) -> str:
    """Cut the middle of a prompt's name, or the end of a baseline's text, to fit a width."""
    tail = (width - 1) // 2 if row.kind == PROMPT else 1
    return shorten(_name(row), width, tail)


def shorten(text: str, width: int, tail: int) -> str:
    """Put ``…`` before the last ``tail`` characters of a text that is wider than ``width``."""
    if cell_len(text) <= width:
        return text
    end = text[len(text) - tail :]
    while cell_len(end) > tail:
        end = end[1:]
    return f"{set_cell_size(text, width - 1 - cell_len(end))}…{end}"
