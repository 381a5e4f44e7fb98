"""Print the results of an evaluation on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

from trainer.reporting.evaluation import (
    CHANGES_REMARK,
    OPTIONAL,
    TaskEvaluation,
    cells,
    changes,
    label,
    remarks,
    titles,
)
from trainer.reporting.terminal_table import GAP, SHORTEST_NAME, shorten
from trainer.runtime.console import Console

#: Characters of an arm's name that are shown before columns are left out.
NAME_WIDTH = 30
#: Characters of a hand-written prompt in a file, which is not wrapped.
TEXT_WIDTH = 72


def show(name: str, task: TaskEvaluation, console: Console) -> None:
    """Print the table of a task and how to read it; a narrow terminal gets fewer columns."""
    columns, rows = titles(task), [cells(task, arm) for arm in task.arms]
    names = [label(task, arm) for arm in task.arms]
    left_out: list[str] = []
    if console.is_terminal:
        columns, rows, left_out, width = _fit(columns, rows, names, console.width)
        names = [shorten(text, width, 1) for text in names]
    else:  # names can be searched for
        names = [
            shorten(text, TEXT_WIDTH, 1) if arm.text else text
            for arm, text in zip(task.arms, names, strict=True)
        ]
    console.print()
    console.table(
        f"{name} ({task.rows:,} rows)",
        ["  prompt", *columns],
        [[text, *row] for text, row in zip(names, rows, strict=True)],
        bold=[i for i, arm in enumerate(task.arms) if arm.name == task.best],
        wrap=False,
    )
    if left_out:
        console.paragraph(f"not shown here: {', '.join(left_out)}; evaluation.json has all")
    for line in remarks(task):
        console.paragraph(line)
    if task.robustness:
        columns, table = changes(task)
        console.print()
        console.table(f"{name}: changed rows", ["prompt, rows", *columns], table, wrap=False)
        console.paragraph(CHANGES_REMARK)


def _fit(
    columns: Sequence[str], rows: Sequence[Sequence[str]], names: Sequence[str], width: int
) -> tuple[list[str], list[list[str]], list[str], int]:
    """Leave out columns until the table fits; return the rest, those left out, the name's width."""
    left_out: list[str] = []
    kept = list(columns)
    wanted = min(NAME_WIDTH, max(map(cell_len, names)))
    optional = [name for name in OPTIONAL if name in kept]
    while True:
        places = [columns.index(name) for name in kept]
        chosen = [[row[place] for place in places] for row in rows]
        widths = [max(map(cell_len, column)) for column in zip(kept, *chosen, strict=True)]
        room = width - sum(widths) - GAP * len(kept)
        if room >= wanted or not optional:
            return kept, chosen, left_out, max(room, SHORTEST_NAME)
        left_out.append(optional[0])
        kept.remove(optional.pop(0))
