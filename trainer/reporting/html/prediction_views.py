"""Collect predictions of the best prompt for the page: confusions, mistakes and samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.evaluation.prediction_files import path_of, read
from trainer.evaluation.score_format import format_score, format_with_interval
from trainer.evaluation.statistics import wilson_interval

#: Limits of the classes of a confusion matrix and of the rows of a list.
MAX_CLASSES, MAX_ROWS = 20, 10
#: Characters of a text in a list; the middle of longer ones is left out.
MAX_CHARACTERS = 600


@dataclass(frozen=True)
class ClassResult:
    """Recall with its 95% interval and precision of a class, or of one label of label sets."""

    label: str
    rows: int
    recall: str
    precision: str


@dataclass(frozen=True)
class PredictionExample:
    """One row and its prediction.

    Attributes:
        place: FILE:LINE of the row.
        probability: probability of the predicted choice, normalized over the choices.
        loss: nats per token of the target.
    """

    place: str
    input: str
    target: str
    prediction: str | None
    correct: bool | None
    probability: float | None = None
    loss: float | None = None


@dataclass
class PredictionReport:
    """Predictions of one prompt.

    Attributes:
        matrix: number of rows of class ``labels[i]`` that were predicted as ``labels[j]``; empty
            with more than ``MAX_CLASSES`` classes.
        confusions: most frequent mistakes (target, prediction, rows), if there is no matrix.
        labels: classes of ``matrix``, in the order of the run file.
    """

    prompt: str
    rows: int
    classes: list[ClassResult] = field(default_factory=list)
    matrix: list[list[int]] = field(default_factory=list)
    confusions: list[tuple[str, str, int]] = field(default_factory=list)
    title: str = ""
    examples: list[PredictionExample] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


def prediction_report(
    output_dir: Path, prompt: str, choices: Sequence[str], metric: str
) -> PredictionReport | None:
    """Read the predictions of a prompt; None if the file is missing or damaged."""
    try:
        records = list(read(path_of(output_dir, prompt)))
        if not records:
            return None
        report = PredictionReport(prompt, len(records))
        if choices and isinstance(records[0].get("target"), list):
            _multi_label(report, records, choices)
        elif choices and "scores" in records[0] and metric != "exact_match":
            _choices(report, records, choices)
        elif "prediction" in records[0]:
            _generated(report, records)
        else:
            _losses(report, records)
        return report
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged file
        return None


def _choices(
    report: PredictionReport, records: Sequence[dict[str, Any]], choices: Sequence[str]
) -> None:
    counts = Counter((r["target"], r["prediction"]) for r in records)
    _classes(
        report,
        choices,
        rows=Counter(r["target"] for r in records),
        predicted=Counter(r["prediction"] for r in records),
        correct=Counter(r["target"] for r in records if r["correct"]),
    )
    if len(choices) <= MAX_CLASSES:
        report.labels = list(choices)
        report.matrix = [[counts[target, predicted] for predicted in choices] for target in choices]
    else:
        wrong = ((a, b, n) for (a, b), n in counts.most_common() if b not in (a, None))
        report.confusions = list(wrong)[:MAX_CLASSES]
    mistakes = [r for r in records if not r["correct"] and _probability(r) is not None]
    mistakes.sort(key=lambda record: -(_probability(record) or 0.0))
    _show(report, "Most confident mistakes", mistakes)


def _multi_label(
    report: PredictionReport, records: Sequence[dict[str, Any]], choices: Sequence[str]
) -> None:
    _classes(
        report,
        choices,
        rows=Counter(label for r in records for label in r["target"]),
        predicted=Counter(label for r in records for label in set(r["prediction"])),
        correct=Counter(x for r in records for x in set(r["target"]) & set(r["prediction"])),
    )
    missed = [r for r in records if not r["correct"] and "input" in r]
    missed.sort(key=lambda r: -len(set(r["target"]) ^ set(r["prediction"])))
    _show(report, "Rows with the most wrong labels", missed)


def _generated(report: PredictionReport, records: Sequence[dict[str, Any]]) -> None:
    # Rows at equal distances, which are the same for every prompt.
    shown = [record for record in records if "input" in record]
    picked = sorted({i * len(shown) // MAX_ROWS for i in range(MAX_ROWS)}) if shown else []
    _show(report, "Generated answers and references", [shown[i] for i in picked])


def _losses(report: PredictionReport, records: Sequence[dict[str, Any]]) -> None:
    scored = [r for r in records if r.get("loss") is not None and "input" in r]
    scored.sort(key=lambda record: -record["loss"] / record["tokens"])
    _show(report, "Rows with the highest loss", scored)


def _classes(
    report: PredictionReport,
    choices: Sequence[str],
    *,
    rows: Counter[str],
    predicted: Counter[str],
    correct: Counter[str],
) -> None:
    shown = [choice for choice in choices if rows[choice] or predicted[choice]]
    if len(choices) > MAX_CLASSES:
        shown.sort(key=lambda choice: -rows[choice])
    for label in shown:
        count, recall = rows[label], "–"
        if count:
            share = correct[label] / count
            recall = format_with_interval("recall", share, wilson_interval(share, count))
        precision = correct[label] / predicted[label] if predicted[label] else None
        report.classes.append(
            ClassResult(label, count, recall, format_score("precision", precision))
        )


def _probability(record: dict[str, Any]) -> float | None:
    probability: float | None = (record.get("probabilities") or {}).get(record.get("prediction"))
    return probability


def _show(report: PredictionReport, title: str, records: Sequence[dict[str, Any]]) -> None:
    report.title = title
    report.examples = [
        PredictionExample(
            place=str(record.get("place", f"row {record['row']}")),
            input=_text(record.get("input")),
            target=_text(record.get("target")),
            prediction=_text(record["prediction"]) if "prediction" in record else None,
            correct=record.get("correct"),
            probability=_probability(record) if isinstance(record.get("prediction"), str) else None,
            loss=record["loss"] / record["tokens"] if record.get("loss") is not None else None,
        )
        for record in records[:MAX_ROWS]
    ]


def _text(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]} […] {text[-half:]}"
