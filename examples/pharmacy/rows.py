"""Write the rows of this example: reviews of satisfied patients, and of dissatisfied ones.

    python examples/pharmacy/rows.py work/data work/pharmacy

``work/data`` is from ``promptshard example smollm2 work --prepare``. Its reviews have two labels in
two files: the condition that the drug treats, and the rating by the patient.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

#: Words that are kept of a review.
WORDS = 48


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    cut = [row | {"text": " ".join(row["text"].split()[:WORDS])} for row in rows]
    distinct = {row["text"]: row for row in cut}
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in distinct.values()]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


def main(data: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    shifted = []
    for split in ("train", "validation"):
        ratings = {row["text"]: row["label"] for row in read(data / f"sentiment.{split}.jsonl")}
        reviews = read(data / f"condition.{split}.jsonl")
        satisfied = [row for row in reviews if ratings[row["text"]] == "positive"]
        write(output / f"{split}.jsonl", satisfied)
        shifted += [row for row in reviews if row not in satisfied]
    write(output / "shifted.jsonl", shifted)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
