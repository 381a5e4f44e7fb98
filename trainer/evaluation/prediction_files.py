"""Prediction files: one record per validation row for every prompt and baseline.

    OUTPUT_DIR/predictions/PROMPT.jsonl                    a prompt at its best step
    OUTPUT_DIR/predictions/baselines/TASK/BASELINE.jsonl   no_prompt, hand_written-1, majority, ...
    OUTPUT_DIR/predictions/train/PROMPT.jsonl              of some train rows, to show overfitting

One JSON object per line. The first ``MAX_TEXTS`` records have texts (at most ``MAX_CHARACTERS``
each) and scores of the choices; the others have only the fields in ``SHORT``. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import LOWER_IS_BETTER
from trainer.evaluation.statistics import RATES
from trainer.runtime.json_file import parse_json

FOLDER, BASELINES, TRAIN = "predictions", "baselines", "train"
#: Kinds of baselines: always the most frequent answer; the base model alone; with a hand-written
#: prompt; with the text that a distilled prompt learns from. Several of a kind are numbered from 1.
MAJORITY, NO_PROMPT, HAND_WRITTEN, TEACHER = "majority", "no_prompt", "hand_written", "teacher"
#: Records with texts and scores in a file, and characters of each text.
MAX_TEXTS, MAX_CHARACTERS = 10_000, 4_000
#: Fields of every record; target and prediction only if they are choices.
SHORT = frozenset({"step", "row", "target", "prediction", "correct", "loss", "tokens", "f1_terms"})


def baseline_file(task: str, baseline: str) -> str:
    """Name of a baseline's file, for ``path_of``."""
    return f"{BASELINES}/{task}/{baseline}"


def train_file(prompt: str) -> str:
    """Name of a prompt's predictions on train rows, for ``path_of``."""
    return f"{TRAIN}/{prompt}"


def path_of(output_dir: Path, name: str) -> Path:
    """Path of the predictions of a prompt, or of the baseline that ``baseline_file`` names."""
    return output_dir / FOLDER / f"{name}.jsonl"


def files_in(output_dir: Path) -> list[Path]:
    """All prediction files of a run, without those in hidden folders: of earlier evaluations."""
    folder = output_dir / FOLDER
    files = sorted(folder.rglob("*.jsonl"))
    return [p for p in files if not any(n.startswith(".") for n in p.relative_to(folder).parts)]


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file; none if it is missing.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not a JSON object.
    """
    try:
        file = path.open(encoding="utf-8", newline="\n")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            record = parse_json(line)
            if not isinstance(record, dict):
                raise ValueError(f"{path}: a line is not a JSON object")
            yield record


def step_of(path: Path) -> int | None:
    """Training step of a prediction file; None if the file is missing or damaged."""
    with suppress(OSError, ValueError):
        step = next(read(path), {}).get("step")
        return step if isinstance(step, int) else None
    return None


@dataclass(frozen=True)
class Outcomes:
    """Contribution of every row to a metric that is a ratio of sums over rows.

    Attributes:
        sums, counts: numerator and denominator of every row.
    """

    rows: list[int]
    sums: list[float]
    counts: list[float]


def outcomes(records: Iterable[Mapping[str, Any]], metric: str) -> Outcomes | None:
    """Return the contribution of every row to the task's metric; None if a field is missing."""
    rows, sums, counts = [], [], []
    for record in records:
        if metric in RATES:
            terms: Sequence[Any] = (record.get("correct"), 1)
        elif metric in LOWER_IS_BETTER:
            terms = (record.get("loss"), record.get("tokens"))
        else:
            terms = record.get("f1_terms") or (None, None)
        if None in terms:
            return None
        rows.append(int(record["row"]))
        sums.append(float(terms[0]))
        counts.append(float(terms[1]))
    return Outcomes(rows, sums, counts) if rows else None
