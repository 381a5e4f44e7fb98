"""``report.html``: one page about a run, in one file, readable without a network.

1. ``collect`` reads the output folder -> ``Report`` with a ``TaskReport`` per task; uses
   ``run_warnings`` (warnings), ``plots`` (SVG and PNG), ``sweep_grids`` (length by learning rate),
   ``paired_rows`` (differences to the best prompt), ``prediction_views`` (confusions, examples) and
   ``inspection_view`` (virtual tokens and controls)
2. ``write_report`` renders ``template.html.j2`` with it -> ``OUTPUT_DIR/report.html``, and writes
   the plots for MLflow -> ``OUTPUT_DIR/plots/*.png``
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jinja2

from trainer.evaluation.score_format import is_loss, score_interval
from trainer.reporting import evaluation
from trainer.reporting.evaluation import effect_text
from trainer.reporting.summary import SUMMARY_FILE
from trainer.runtime import atomic_io
from trainer.runtime.redact import redact
from trainer.tracking.run_metadata import PLOTS

__all__ = ["write_missing_report", "write_report"]


def write_report(output_dir: Path | str) -> Path:
    """Write ``OUTPUT_DIR/report.html``.

    Reads ``summary.json``, ``metrics.jsonl``, ``run.yaml``, ``environment.json``,
    ``datasets.json``, ``evaluation.json``, ``inspection.json`` and ``predictions/`` there; sections
    of missing files are left out.

    Raises:
        BadInput: a newer version wrote ``summary.json``.
    """
    from trainer.reporting.html.collect import collect  # imports matplotlib

    output_dir = Path(output_dir)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trainer.reporting.html", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("template.html.j2")
    report = collect(output_dir)
    html = template.render(
        report=report,
        is_loss=is_loss,
        score_interval=score_interval,
        evaluation=evaluation,
        effect_text=effect_text,
    )
    for plot in report.plots:
        path = output_dir / PLOTS / f"{plot.name}.png"
        path.parent.mkdir(exist_ok=True)
        atomic_io.write(path, plot.png)
    path = output_dir / "report.html"
    atomic_io.write(path, redact(html))
    return path


def write_missing_report(output_dir: Path, warn: Callable[[str], None]) -> None:
    """Write the report of a finished run if it is missing or older than the summary."""
    report = output_dir / "report.html"
    try:
        summary = output_dir / SUMMARY_FILE
        if report.is_file() and report.stat().st_mtime >= summary.stat().st_mtime:
            return
        write_report(output_dir)
    except Exception as error:  # the results themselves are in summary.json
        warn(f"no report written: {type(error).__name__}: {error}")
