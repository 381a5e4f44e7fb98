"""Does calibration of the choices help? Measured on the predictions of a finished run.

    promptshard example smollm2 runs/smollm2
    python -m benchmarks.calibration runs/smollm2/run

Calibration subtracts from the log-likelihood of every choice its mean over texts, so that the
choices become equally frequent (contextual calibration, Zhao et al. 2021, arXiv 2102.09690, takes
the mean over texts without content; batch calibration, Zhou et al. 2023, arXiv 2309.17249, over
unlabelled rows, as here). The second variant makes the choices as frequent as in labelled rows. The
mean is taken over one half of the validation rows and the accuracy over the other half, for 20
random halves. Writes a table to benchmarks/results/calibration.md.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "calibration.md"
DRAWS = 20

Record = Mapping[str, Any]


def accuracy(records: Sequence[Record], offsets: Mapping[str, float]) -> float:
    """Share of rows whose choice with the highest score minus its offset is the target."""
    correct = 0
    for record in records:
        scores = record["scores"]
        correct += max(scores, key=lambda c: scores[c] - offsets[c]) == record["target"]
    return correct / len(records)


def offsets(records: Sequence[Record], *, labelled: bool) -> dict[str, float]:
    """Return the log of each choice's mean probability, over its frequency if ``labelled``."""
    choices = list(records[0]["scores"])
    values = {c: math.log(fmean(r["probabilities"][c] for r in records)) for c in choices}
    if labelled:
        for c in choices:
            count = sum(r["target"] == c for r in records) + 1
            values[c] -= math.log(count / (len(records) + len(choices)))
    return values


def halves(records: Sequence[Record]) -> Iterator[tuple[list[Record], list[Record]]]:
    for seed in range(DRAWS):
        drawn = list(records)
        random.Random(seed).shuffle(drawn)
        middle = len(drawn) // 2
        yield drawn[:middle], drawn[middle:]
        yield drawn[middle:], drawn[:middle]


def table_row(name: str, records: Sequence[Record]) -> str:
    plain = accuracy(records, dict.fromkeys(records[0]["scores"], 0.0))
    cells = [f"| {name} | {plain:.1%} |"]
    for labelled in (False, True):
        score = fmean(
            accuracy(reported, offsets(read, labelled=labelled))
            for read, reported in halves(records)
        )
        cells.append(f" {score:.1%} ({100 * (score - plain):+.1f}) |")
    return "".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    folder = parser.parse_args().run_dir / "predictions"
    lines = [
        "# Calibration of choices",
        "",
        "`python -m benchmarks.calibration RUN_DIR`: accuracy on validation rows, and with the",
        "choices made equally frequent, or as frequent as in labelled rows. The means over one",
        "half of the rows are applied to the other half.",
        "",
        "| prompt | not calibrated | equally frequent | as frequent as labels |",
        "|---|---|---|---|",
    ]
    files = [*sorted(folder.glob("*.jsonl")), *sorted(folder.glob("baselines/*/*.jsonl"))]
    for file in files:
        records = [json.loads(line) for line in file.read_text().splitlines()]
        if records and "scores" in records[0]:
            name = file.relative_to(folder).with_suffix("")
            lines.append(
                table_row(str(name).removeprefix("baselines/").replace("/", ", "), records)
            )
    if len(lines) == 8:
        parser.error(f"{folder}: has no predictions with scores of choices")
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
