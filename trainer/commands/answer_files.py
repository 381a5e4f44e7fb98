"""Write the numbers of a command that measures a finished run."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from trainer.reporting.html import write_report
from trainer.runtime import atomic_io
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import to_json


def write_numbers(
    numbers: BaseModel,
    run_dir: Path,
    default_file: str,
    chosen: str | None,
    console: Console,
    *,
    remark: str = "",
) -> None:
    """Write ``default_file`` of the run and its report, or the file of ``--json``.

    Args:
        chosen: the value of ``--json``; ``-``: print the numbers.
        remark: follows the path in the line that names it.

    Raises:
        BadInput: the file cannot be written.
    """
    content = numbers.model_dump(mode="json")
    if chosen == "-":
        console.answer(to_json(content, indent=2))
        return
    path = Path(chosen) if chosen else run_dir / default_file
    try:
        atomic_io.write_json(path, content)
    except OSError as error:
        raise BadInput(f"--json: cannot write {path}: {error.strerror}") from None
    console.print(f"\nall numbers: {path}{remark}")
    report = run_dir / "report.html"
    if report.is_file() and not chosen:
        with console.phase("writing the report"):
            write_report(run_dir)
        console.print(f"report: {report}")
