"""``report.html``: what a person looks at when a run has ended. One file, no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jinja2

from trainer.evaluation.score_format import column_title, is_loss
from trainer.reporting.html.collect import collect
from trainer.runtime import atomic_io
from trainer.runtime.redact import redact

__all__ = ["write_missing_report", "write_report"]


def write_report(output_dir: Path | str) -> Path:
    """Write ``OUTPUT_DIR/report.html`` from the files of ``output_dir`` alone.

    It reads ``summary.json``, ``metrics.jsonl``, ``run.yaml``, ``environment.json`` and
    ``datasets.json``; a part whose file is missing is left out.
    """
    output_dir = Path(output_dir)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trainer.reporting.html", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("template.html.j2")
    html = template.render(report=collect(output_dir), is_loss=is_loss, column_title=column_title)
    path = output_dir / "report.html"
    atomic_io.write(path, redact(html))
    return path


def write_missing_report(output_dir: Path, warn: Callable[[str], None]) -> None:
    """Write the report of a finished run that was killed before it had done so."""
    report = output_dir / "report.html"
    try:
        if report.is_file() and report.stat().st_mtime >= _written(output_dir):
            return
        write_report(output_dir)
    except Exception as error:  # the results themselves are in summary.json
        warn(f"no report written: {type(error).__name__}: {error}")


def _written(output_dir: Path) -> float:
    return (output_dir / "summary.json").stat().st_mtime
